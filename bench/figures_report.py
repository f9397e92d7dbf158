"""The report of the first figures: raw documents in, markdown out. Pure; says what the raw file says, no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from bench.figures import alone_tables, phase_table, stream_table
from bench.load import Record

_RECORD_FIELDS = {field.name for field in fields(Record)}


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """The page. Raises ``ValueError`` when the raw file has no run."""
    runs = [document for document in documents if document["record"] == "run"]
    if not runs:
        raise ValueError("the raw file has no record of a run")
    run = runs[0]
    blocks = [document for document in documents if document["record"] == "block"]
    records = [
        Record(**{key: value for key, value in document.items() if key in _RECORD_FIELDS})
        for document in documents
        if document["record"] == "request"
    ]
    titles = {name: run["systems"][name]["title"] for name in dict.fromkeys(run["order"])}
    stream_cpu_s: dict[str, list[float]] = {}
    for block in blocks:
        if block.get("stream_cpu_s") is not None:
            stream_cpu_s.setdefault(block["system"], []).append(block["stream_cpu_s"])
    cpu_s = {name: sum(spent) / len(spent) for name, spent in stream_cpu_s.items()}
    plan = run["plan"]
    return (
        "\n\n".join(
            [
                "# First figures" + (" (quick run)" if run["is_quick"] else ""),
                _introduction(run),
                "## Requests alone",
                f"One request at a time, {plan['alone_output_token_count']} tokens of output. TTFT from the intended "
                "send time; ITL between messages (one token each unless the raw records say otherwise), the gap "
                "from the first to the second token included. CPU is that of all processes of the system.",
                alone_tables(records, titles, run["seed"]),
                "## Streams while long prompts arrive",
                f"{plan['stream_run_count']} runs a block: "
                f"{plan['stream_count']} streams of {plan['stream_output_token_count']} tokens; once all flow, "
                f"{plan['arrival_count']} prompts of {plan['arrival_prompt_token_count']} tokens arrive, one every "
                f"{plan['arrival_interval_s']:g} s. Gaps of the streams that ended after the first arrival.",
                stream_table(records, titles, cpu_s, run["seed"]),
                *(
                    ["## Where Baton's time went", "Medians of what each answer said of itself.", phases]
                    if (phases := phase_table(records))
                    else []
                ),
                "## How it was run",
                _blocks_table(blocks, titles),
                _how(run),
            ]
        )
        + "\n"
    )


def _introduction(run: Mapping[str, Any]) -> str:
    machine = run["machine"]
    return (
        f"{machine['core_count']} cores of {machine['cpu_model']}, {machine['memory_gib']} GiB, Linux "
        f"{machine['kernel']}; {run['model']}; commit {machine['commit']}, {machine['at']}. On such a machine only "
        "the ratios mean anything: **peer / Baton, above 1 Baton is the faster or the cheaper**, with a 95% "
        "bootstrap interval; “no claim” where it includes 1. A p99 of fewer than 100 values is near their maximum."
    )


def _blocks_table(blocks: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    lines = [
        "| block | system | start | run | idle CPU | machine busy | others | steal | |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for block in blocks:
        head = f"| {block['block'] + 1} | {titles[block['system']]} |"
        if "machine" not in block:
            lines.append(f"{head} — | — | — | — | — | — | {block['error']} |")
            continue
        use = block["machine"]
        idle = block["idle_cpu_share"]
        remark = "; ".join(
            [*([block["error"]] if block["error"] else []), *(["steal above 2%"] if block["too_much_steal"] else [])]
        )
        lines.append(
            f"{head} {block['facts']['start_s']} s | {block['wall_s']} s | "
            f"{'—' if idle is None else f'{idle:.2f} cores'} | {use['busy_share']:.0%} | {use['others_share']:.0%} | "
            f"{use['steal_share']:.1%} | {remark} |"
        )
    return "\n".join(lines)


def _how(run: Mapping[str, Any]) -> str:
    engine = run["engines"]["decode"]
    packages = ", ".join(f"{name} {number}" for name, number in run["machine"]["packages"].items())
    lines = [
        f"- Order of blocks: {', '.join(run['order'])}. Each system's processes live in its block only. Warm-up, "
        "excluded: three requests and one second. “Others” is machine time used neither by the system nor by "
        "the load generator.",
        f"- Seed {run['seed']}: unique random-token prompts of exact length, the same for every system of a round. "
        "Greedy, `ignore_eos`, token ids in, text out.",
        f"- Every engine: {engine['dtype']}, {'eager' if engine['enforce_eager'] else 'compiled'}, blocks of "
        f"{engine['block_token_count']}, {engine['kv_cache_bytes'] / 2**20:.0f} MiB of KV, context "
        f"{engine['max_context_token_count']}, at most {engine['max_running_count']} running, "
        f"{run['engines']['prefill']['max_batched_token_count']} tokens a step (decode workers: "
        f"{engine['max_batched_token_count']}), prefix caching {'on' if engine['enable_prefix_caching'] else 'off'}; "
        "the same preloads (tcmalloc, libiomp5, where installed). The one vLLM engine takes vLLM's own 2048 tokens a "
        "step unless its column says otherwise.",
        f"- Baton: `baton up` with the runner “{run['runner']}”, prefill on the first core, decode on the second; "
        "router and load generator float over both, as does the stock proxy.",
        "- One vLLM engine: OpenAI server and engine pinned to the first core, UniProc executor; the load generator "
        "has the second core to itself. “As shipped”: vLLM's default executor.",
        "- Stock vLLM P/D: two OpenAI servers with `NixlConnector` (pull), one core each, and our minimal aiohttp "
        "proxy (`bench/stock_proxy.py`). “Tuned”: UniProc executor, and after start all threads moved back to "
        "their engine's core (the connector moves both engines' main threads to the machine's last core). “As "
        "shipped”: default executor, threads where the connector puts them. In both NIXL's progress thread spins; "
        "vLLM has no option for it.",
        f"- {packages}.",
        "- Raw records: the file named like this page under `docs/evidence/`; `python -m bench.first_figures "
        "--report-from` makes this page from it.",
    ]
    return "\n".join(lines)
