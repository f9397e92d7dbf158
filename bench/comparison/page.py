"""The page of the comparison: raw documents in, markdown out. Pure; says what the raw file says, no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.comparison import tables
from bench.comparison.cells import (
    ALONE_LENGTHS,
    ALONE_OUTPUT_TOKEN_COUNT,
    ARRIVAL_INTERVAL_S,
    ARRIVAL_TOKEN_COUNT,
    CODE_SCALE,
    CROWD_COUNT,
    FIRST_ARRIVAL_S,
    STREAM_COUNT,
    STREAM_TOKEN_COUNTS,
)
from bench.comparison.goals import goal_lines, goals_table
from bench.comparison.tables import CellRun
from bench.results.run_data import RunData
from bench.results.store import request_from_json

SLO_FACTORS = (1.0, 4.0)
MEANT = {
    "alone": f"Prompts of {', '.join(f'{length:,}' for length in ALONE_LENGTHS)} tokens one after another, "
    f"{ALONE_OUTPUT_TOKEN_COUNT} tokens of output.",
    "streams": f"{STREAM_COUNT} streams of {STREAM_TOKEN_COUNTS[1]} tokens; from {FIRST_ARRIVAL_S:g} s on, "
    f"{STREAM_COUNT} prompts of {ARRIVAL_TOKEN_COUNT:,} tokens arrive {ARRIVAL_INTERVAL_S:g} s apart. Gaps are those "
    "of the streams that ended after the first arrival.",
    "crowd": f"{CROWD_COUNT} callers, each asking again as soon as it was answered.",
}


_NOT_OF_THE_RECORD = ("document", "system", "block", "pass", "cell")


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """The page. Raises ``ValueError`` when the raw file has no run."""
    run = next((document for document in documents if document["document"] == "run"), None)
    if run is None:
        raise ValueError("the raw file has no record of a run")
    blocks = [document for document in documents if document["document"] == "block"]
    cells = [document for document in documents if document["document"] == "cell"]
    runs = cell_runs(documents)
    titles = {name: run["systems"][name]["title"] for name in dict.fromkeys(run["order"])}
    groups = list(dict.fromkeys(cell["group_name"] for cell in cells))
    groups.sort(key=lambda group: (group.partition("@")[0], float(group.partition("@")[2] or 0)))
    seed = run["seed"]
    parts = [
        "# Baton beside its peers" + (" (quick run)" if run["is_quick"] else ""),
        _introduction(run, runs, titles),
        "## The goals, set before the run",
        goals_table(goal_lines(runs, titles, seed)),
        "## Load by load",
    ]
    for group in groups:
        chosen = [each for each in runs if each.group == group]
        parts += [f"### {group}", _meant(group, chosen), tables.table(chosen, titles, _measures(group), seed)]
        skipped = [cell for cell in cells if cell["group_name"] == group and "skipped" in cell]
        if skipped:
            names = sorted({titles[cell["system"]] for cell in skipped})
            parts.append(f"Not asked, since a lower rate was beyond it already: {', '.join(names)}.")
    factors = " and ".join(f"{factor:g}x" for factor in SLO_FACTORS)
    parts += [
        "## Goodput under each SLO preset",
        "Share of all requests asked that met the bounds of TTFT, of TPOT and of their own longest gap, with the "
        f"preset's times multiplied by {factors}. Loads with long prompts count those, too.",
        tables.goodput_table(runs, groups, titles, SLO_FACTORS),
        "## How it was run",
        _turns(blocks, cells, titles),
        *_cut_off(run, blocks, cells, titles),
        _how(run),
    ]
    return "\n\n".join(parts) + "\n"


def cell_runs(documents: Sequence[Mapping[str, Any]]) -> list[CellRun]:
    """The cells that were run, with their requests, in the order of the file. ``ValueError`` where requests lack."""
    records: dict[tuple[int, str], list[Any]] = {}
    for document in documents:
        if document["document"] == "request":
            row = {key: each for key, each in document.items() if key not in _NOT_OF_THE_RECORD}
            records.setdefault((document["block"], document["cell"]), []).append(request_from_json(_whole(row)))
    for cell in documents:
        if cell["document"] == "cell" and "skipped" not in cell:
            found = len(records.get((cell["block"], cell["cell"]), ()))
            if found != cell["request_count"]:
                raise ValueError(
                    f"turn {cell['block'] + 1}, {cell['cell']}: {found} of {cell['request_count']} requests are in "
                    "the raw file: it was cut off"
                )
    return [
        CellRun(
            system=cell["system"],
            block=cell["block"],
            pass_number=cell["pass"],
            cell=cell["cell"],
            group=cell["group_name"],
            records=records.get((cell["block"], cell["cell"]), []),
            span_s=cell["span_s"],
            cpu_s=cell["cpu_s"],
            facts=cell["plan"],
            remarks=cell.get("remarks", ()),
        )
        for cell in documents
        if cell["document"] == "cell" and "skipped" not in cell
    ]


def sweeps(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[RunData]]:
    """By open-loop workload, its loads as runs that a report can be made of: a system is a label, a cell a rate."""
    run = next(document for document in documents if document["document"] == "run")
    cells = {cell["name"]: cell for cell in run["cells"]}
    found: dict[str, list[RunData]] = {}
    for each in cell_runs(documents):
        cell = cells[each.cell]
        if cell["rate_per_s"] is None:
            continue
        title = run["systems"][each.system]["title"]
        facts = {
            "kind": "measured",
            "label": title,
            "target": {"kind": run["systems"][each.system].get("kind"), "address": title},
            "plan": {**each.facts, **{key: cell[key] for key in ("workload", "rate_per_s", "duration_s")}},
            "machine": run["machine"],
            "model": run["model"],
            "started_at": run["machine"]["at"],
            "worker_counts": None,
            "valid": not each.remarks,
            "invalid_reasons": list(each.remarks),
            "slo_scale": 1.0,
        }
        found.setdefault(cell["workload"], []).append(RunData(facts, list(each.records)))
    return found


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """With the empty fields that the raw file leaves out."""
    empty: dict[str, Any] = {"session_id": "", "error": None, "phases_s": None, "kv_transfer_bytes": None}
    empty |= {"placement": None, "attempt_count": None, "prefill_worker_id": None, "decode_worker_id": None}
    return {**empty, "cached_prompt_token_count": None, **row}


def _measures(group: str) -> tuple[tables.Measure, ...]:
    if group == "alone":
        return tables.alone_measures(ALONE_LENGTHS)
    return tables.STREAMS if group == "streams" else tables.OPEN_LOOP


def _meant(group: str, runs: Sequence[CellRun]) -> str:
    if group in MEANT:
        return MEANT[group]
    prompts = [record.prompt_token_count for run in runs for record in run.records]
    outputs = [record.output_token_limit for run in runs for record in run.records]
    if not prompts:
        return "No request was asked."
    what = "sessions" if group.startswith("agent") else "requests"
    return (
        f"Open loop, {group.partition('@')[2]} {what} a second. Prompts of {min(prompts):,} to {max(prompts):,} "
        f"tokens (mean {sum(prompts) / len(prompts):,.0f}), answers of {min(outputs)} to {max(outputs)} (mean "
        f"{sum(outputs) / len(outputs):.0f})."
    )


def _introduction(run: Mapping[str, Any], runs: Sequence[CellRun], titles: Mapping[str, str]) -> str:
    machine = run["machine"]
    return (
        f"{machine['core_count']} cores of {machine['cpu_model']}, {machine['memory_gib']} GiB, Linux "
        f"{machine['kernel']}; {run['model']}; commit {machine['commit']}, {machine['at']}. {len(titles)} systems, "
        f"{sum(len(each.records) for each in runs):,} requests. On such a machine only the ratios mean anything: "
        "**peer / Baton 1P+1D, above 1 Baton is the faster**, over the passes and loads that both were asked, with a "
        "95% bootstrap interval; “no claim” where it includes 1. With two passes an interval is an indication; by "
        "our own rule a claim takes ten pairs. All latencies count from the intended send time. ≥: some were given "
        "up or cut off, and count with what they had waited by then. A p99 of fewer than 100 values is near "
        "their maximum. Answers, tokens and goodput a second have no intervals."
    )


def _turns(blocks: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    lines = [
        "| turn | system | pass | busy before | start | whole turn | others, worst load | lag p99, worst | remarks |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for block in blocks:
        mine = [cell for cell in cells if cell["block"] == block["block"]]
        remarks = [f"{cell['cell']}: {remark}" for cell in mine for remark in cell.get("remarks", ())]
        remarks += [
            f"{c['cell']}: waited {c['calm_wait_s']:.0f} s before" for c in mine if c.get("calm_wait_s", 0) > 10
        ]
        if block.get("error"):
            remarks.insert(0, block["error"])
        facts = block.get("facts", {})
        others = max((cell["machine"]["others_share"] for cell in mine if "machine" in cell), default=0.0)
        lag_ms = max((cell["lag_p99_ms"] for cell in mine if "lag_p99_ms" in cell), default=0.0)
        lines.append(
            f"| {block['block'] + 1} | {titles[block['system']]} | {block['pass'] + 1} | "
            f"{block['busy_share_before']:.0%} | {facts.get('start_s', '—')} s | {block.get('wall_s', '—')} s | "
            f"{others:.0%} | {lag_ms:.1f} ms | {'; '.join(remarks)} |"
        )
    return "\n".join(lines)


def _cut_off(
    run: Mapping[str, Any],
    blocks: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str],
) -> list[str]:
    """What a run that did not go to its end lacks; nothing for one that did."""
    ended = {block["block"] for block in blocks}
    begun = {cell["block"]: cell for cell in cells if cell["block"] not in ended}
    missing = [name for number, name in enumerate(run["order"]) if number not in ended and number not in begun]
    told = [
        f"Turn {number + 1}, {titles[cell['system']]}, was cut off: only its loads above were run."
        for number, cell in begun.items()
    ]
    if missing:
        told.append(f"Turns that were planned and not run: {', '.join(titles[name] for name in missing)}.")
    return [" ".join(told)] if told else []


def _how(run: Mapping[str, Any]) -> str:
    engine = run["engines"]["decode"]
    packages = ", ".join(f"{name} {number}" for name, number in run["machine"]["packages"].items())
    lines = [
        "- Systems take turns in mirrored order, each with its processes alive in its turn only. Before a load, a "
        "short request is repeated until it takes at most twice what it takes on an idle system (at most 60 s).",
        f"- Seed {run['seed']}: the same requests at the same intended times for every system of a pass; greedy, end "
        "tokens ignored, token ids in. A request that is not done within its deadline (30 s unless its load says "
        "otherwise) is cut off and counts as not answered.",
        f"- Every vLLM engine: {engine['dtype']}, eager, blocks of {engine['block_token_count']}, "
        f"{engine['kv_cache_bytes'] // 2**20} MiB of KV, context {engine['max_context_token_count']}, at most "
        f"{engine['max_running_count']} running; chunk and cores as the titles and docs/workbench/peers.md say.",
        f"- {_trace(run['trace'])}",
        "- The load generator runs at a higher priority than the systems (nice -10), the same for all: it has "
        "to send and stamp on time.",
        "- CPU is that of all processes of the system, the load generator not among them; both share the two cores.",
        f"- {packages}; Python {run['machine']['python']}.",
        "- Raw records: the file named like this page under `docs/evidence/`; `python -m bench.comparison "
        "--page-from` makes this page from it.",
    ]
    return "\n".join(lines)


def _trace(facts: Mapping[str, Any]) -> str:
    if not facts:
        return "The code load is a likeness of the public code trace: its kind of lengths and bursts, no row of it."
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    return f"The code load is rows of a public trace in sequence, lengths times {CODE_SCALE:g}: {told}."
