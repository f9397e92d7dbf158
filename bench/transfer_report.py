"""The report of the transfer figures: raw records in, markdown out. Pure; says what the raw file says, no more."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.kv_pair import BATON_PATHS, PATHS, WITHOUT_DIGESTS
from bench.results.statistics import Blocks, Ratio, Statistic, bootstrap_ratio, p50, percentile, pooled
from bench.tcp_report import tcp_section
from bench.transfer_pairs import LAYOUTS, MEMCPY

Record = Mapping[str, Any]

TITLES = {
    "baton": "Baton",
    WITHOUT_DIGESTS: "Baton without digests",
    "stock-as-shipped": "stock, as shipped",
    "stock-tuned": "stock, tuned",
    "stock-no-progress-thread": "stock, no progress thread",
    "raw": "raw NIXL",
}
BANDWIDTH_GOAL = 0.85
BANDWIDTH_GOAL_FROM_BYTES = 4 << 20
EXPOSED_GOAL = 1 / 3
EXPOSED_SHARE_GOAL = 0.05
TTFT_GOALS = {64: 1.10, 512: 1.05, 2000: 1.05}
UNDISTURBED_GOAL = 0.97
IDLE_GOAL = 0.02


def render(documents: Sequence[Record]) -> str:
    """The page. Raises ``ValueError`` when the raw file has no run."""
    run = next((document for document in documents if document["record"] == "run"), None)
    if run is None:
        raise ValueError("the raw file has no record of a run")
    machine = run["machine"]
    parts = [
        "# The transfer, side by side" + (" (quick run)" if run["is_quick"] else ""),
        f"{machine['core_count']} cores of {machine['cpu_model']}, {machine['memory_gib']} GiB, Linux "
        f"{machine['kernel']}; {run['model']}; commit {machine['commit']}, {machine['at']}. On such a machine only "
        "ratios mean anything; they are **Baton / peer** with a 95% bootstrap interval, of medians unless they say "
        "otherwise. A goal counts as met where the ratio meets it; “surely” where the whole interval does.",
    ]
    reads = [document for document in documents if document["record"] == "read"]
    if reads:
        parts += ["## Bandwidth", _BANDWIDTH, _bandwidth_verdicts(reads, run)]
        parts += [_bandwidth_table(reads, run), _parts_table(reads, run)]
    parts += tcp_section(documents, run["seed"])
    requests = [document for document in documents if document["record"] == "request"]
    if requests:
        parts += _system_sections(requests, run)
    idle = [document for document in documents if document["record"].startswith("idle")]
    if idle:
        parts += ["## Idle", _IDLE, _idle_table(idle, run)]
    parts += ["## How it was run", _how(documents, run)]
    return "\n\n".join(parts) + "\n"


_BANDWIDTH = (
    "Bytes over the time a transfer takes, in two meanings. *The read*: from the post of the NIXL transfer to its "
    "end, by NIXL's own clock; what stock vLLM and NIXL report as bandwidth, and what the goal most plainly "
    "means. *Asked to usable*: from the call of the engine step that is asked to pull to the call that reports "
    "the KV as received: hold record, descriptors, read, the record again, and with digests the check of every "
    "block. Raw NIXL is timed alike: post to end, and with the making of its descriptors.\n\n"
    "Between two processes with KV laid out as the default model's and no model: 30 layers, 96 KiB per layer and "
    "block of 128 tokens; less than a block, 2.8 MiB, never moves, so 0.7 and 4.2 MiB are of blocks of 32 tokens. "
    "*Adjacent*: block ids as a fresh pool gives them out, which NIXL merges into one descriptor a layer. "
    "*Descending*: as a pool gives them out that got them back, from the last to the first. *Scattered*: at "
    "random. Raw NIXL reads one region with the descriptor size that was best for that many bytes. memcpy is "
    "within one process."
)
_IDLE = (
    "CPU while nothing is asked, in cores. Connectors: each end of a pair, without an engine. Systems: each engine "
    "process with the worker or server process that owns it, and all processes, router or proxy included."
)


def _by_round(records: Sequence[Record], value: Callable[[Record], float | None]) -> Blocks:
    """Units by round or block; a record is a unit."""
    blocks: dict[int, list[list[float]]] = {}
    for record in records:
        measured = value(record)
        if measured is not None:
            blocks.setdefault(record.get("block", 0), []).append([measured])
    return blocks


def _ratio(ours: Blocks, theirs: Blocks, statistic: Statistic, run: Record) -> Ratio:
    return bootstrap_ratio(ours, theirs, statistic, random.Random(run["seed"]))  # noqa: S311 resampling, no secret


def _verdict(ratio: Ratio, goal: float, *, at_least: bool) -> str:
    sign, worst = ("≥", ratio.low) if at_least else ("≤", ratio.high)

    def meets(value: float) -> bool:
        return value >= goal if at_least else value <= goal

    said = "missed" if not meets(ratio.value) else "met" if worst is None or not meets(worst) else "surely met"
    return f"{_interval(ratio)}; goal {sign} {goal:.2f}: **{said}**"


def _interval(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}" + ("" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _elapsed(record: Record) -> float:
    return float(record["elapsed_s"])


def _wire(record: Record) -> float | None:
    if record["path"] == "raw":
        return float(record.get("wire_s", record["elapsed_s"]))
    return float(record["wire_s"]) or None


def _of(reads: Sequence[Record], byte_count: int, path: str, layout: str) -> list[Record]:
    return [r for r in reads if (r["byte_count"], r["path"], r["layout"]) == (byte_count, path, layout)]


def _sizes(reads: Sequence[Record]) -> list[int]:
    return sorted({record["byte_count"] for record in reads})


def _raw(reads: Sequence[Record], byte_count: int) -> tuple[int, list[Record]]:
    """Raw NIXL's descriptor size whose median was best for that many bytes, and its reads."""
    sizes = {
        int(r["layout"])
        for r in reads
        if (r["byte_count"], r["path"]) == (byte_count, "raw") and r["layout"] != MEMCPY
    }
    best = min(sizes, key=lambda size: p50([_elapsed(r) for r in _of(reads, byte_count, "raw", str(size))]))
    return best, _of(reads, byte_count, "raw", str(best))


def _share(
    raw: Sequence[Record], ours: Sequence[Record], value: Callable[[Record], float | None], run: Record
) -> Ratio:
    """A bandwidth over raw NIXL's: times the other way round."""
    return _ratio(_by_round(raw, value), _by_round(ours, value), p50, run)


def _bandwidth_verdicts(reads: Sequence[Record], run: Record) -> str:
    """The goal by each meaning of the word. Adjacent blocks: what a pool gives out that nothing has fragmented."""
    meanings = (("baton", _wire), (WITHOUT_DIGESTS, _elapsed), ("baton", _elapsed))
    rows = []
    for byte_count in _sizes(reads):
        if byte_count < BANDWIDTH_GOAL_FROM_BYTES:
            continue
        _, raw = _raw(reads, byte_count)
        row = [_size(byte_count)]
        for path, value in meanings:
            ours = _of(reads, byte_count, path, "adjacent")
            has_any = bool(pooled(_by_round(ours, value)))
            row.append(_verdict(_share(raw, ours, value, run), BANDWIDTH_GOAL, at_least=True) if has_any else "—")
        rows.append(row)
    return _table(("moved", "the read", "asked to usable, without digests", "asked to usable, with digests"), rows)


def _size(byte_count: int) -> str:
    return f"{byte_count / 2**20:.1f} MiB"


def _bandwidth_table(reads: Sequence[Record], run: Record) -> str:
    rows = []
    for byte_count in _sizes(reads):
        best, raw = _raw(reads, byte_count)
        kinds = [("memcpy", _of(reads, byte_count, "raw", MEMCPY)), (f"raw NIXL, {best / 1024:.0f} KiB each", raw)]
        kinds += [
            (f"{TITLES[path]}, {layout}", records)
            for path in PATHS
            for layout in LAYOUTS
            if (records := _of(reads, byte_count, path, layout))
        ]
        for title, records in kinds:
            row = [_size(byte_count), title, str(len(records))]
            for value in (_wire, _elapsed):
                times = pooled(_by_round(records, value))
                if not times:
                    row += ["—", "—", ""]
                    continue
                row += [f"{p50(times) * 1e3:.2f} ms", f"{byte_count / p50(times) / 1e9:.1f} GB/s"]
                is_reference = title.startswith(("raw", "memcpy"))
                row += ["" if is_reference else _interval(_share(raw, records, value, run))]
            rows.append(row)
    head = (
        "moved",
        "by",
        "n",
        "the read",
        "bandwidth",
        "of raw NIXL's",
        "asked to usable",
        "bandwidth",
        "of raw NIXL's",
    )
    return _table(head, rows)


def _parts_table(reads: Sequence[Record], run: Record) -> str:
    """Where Baton's time goes, and what its digests add."""
    rows = []
    for byte_count in _sizes(reads):
        for layout in LAYOUTS:
            chosen = _of(reads, byte_count, "baton", layout)
            if not chosen:
                continue
            cells = [p50([float(record.get(key, 0.0)) for record in chosen]) * 1e3 for key in _PARTS]
            rest = p50([_elapsed(r) - sum(float(r.get(key, 0.0)) for key in _PARTS) for r in chosen]) * 1e3
            descriptors = p50([float(record["descriptor_count"]) for record in chosen])
            row = [f"{_size(byte_count)}, {layout}", f"{descriptors:.0f}"]
            row += [*(f"{cell:.2f} ms" for cell in cells), f"{rest:.2f} ms"]
            without = _of(reads, byte_count, WITHOUT_DIGESTS, layout)
            row += [
                _interval(_share(chosen, without, _elapsed, run)) if without else "—"
            ]  # of times: the first over the second
            rows.append(row)
    head = ("moved", "descriptors", *_PARTS.values(), "the connector's own code", "with digests / without")
    return "Where Baton's time goes, medians; and asked to usable with digests over without:\n\n" + _table(head, rows)


_PARTS = {"wire_s": "the read of the blocks", "verify_s": "hold record and digests"}


def _ttft(record: Record) -> float | None:
    return None if record.get("error") else record["token_at"][0] - record["sent_at"]


def _first_gap(record: Record) -> float | None:
    return None if record.get("error") else record["token_at"][1] - record["token_at"][0]


def _split_steps(record: Record) -> tuple[list[Record], list[Record]]:
    """Steps of the engine that computed the prompt, and of another that went on: none where there is one engine."""
    steps = sorted(record.get("steps", ()), key=lambda step: float(step["began_at"]))
    if record.get("error") or not steps:
        return [], []
    first = steps[0]["pid"]
    return [s for s in steps if s["pid"] == first], [s for s in steps if s["pid"] != first]


def _exposed(record: Record) -> float | None:
    """From the prefill's last step to the decode's first."""
    prefill, decode = _split_steps(record)
    return float(decode[0]["began_at"] - prefill[-1]["ended_at"]) if prefill and decode else None


def _exposed_share(record: Record) -> float | None:
    exposed, ttft = _exposed(record), _ttft(record)
    return None if exposed is None or ttft is None else exposed / ttft


def _prefill_tokens_per_s(record: Record) -> float | None:
    steps, _ = _split_steps(record)
    prompt = [step for step in steps if step["token_count"] > 1]
    return record["prompt_token_count"] / (prompt[-1]["ended_at"] - prompt[0]["began_at"]) if prompt else None


def _decode_steps(record: Record) -> list[Record]:
    prefill, decode = _split_steps(record)
    return [step for step in decode or prefill if step["token_count"] == 1]


def _decode_step(record: Record) -> float | None:
    """The median of an answer, without its first step."""
    steps = _decode_steps(record)[1:]
    return p50([step["ended_at"] - step["began_at"] for step in steps]) if steps else None


def _first_decode_step(record: Record) -> float | None:
    steps = _decode_steps(record)[:1]
    return float(steps[0]["ended_at"] - steps[0]["began_at"]) if steps else None


def _system_sections(requests: Sequence[Record], run: Record) -> list[str]:
    lengths = sorted({record["prompt_token_count"] for record in requests})

    def of(system: str, length: int, value: Callable[[Record], float | None]) -> Blocks:
        chosen = [r for r in requests if r["system"] == system and r["prompt_token_count"] == length]
        return _by_round(chosen, value)

    def cell(system: str, length: int, value: Callable[[Record], float | None], scale: float, unit: str) -> str:
        values = pooled(of(system, length, value))
        return f"{p50(values) * scale:.1f} {unit}" if values else "—"

    def compared(
        length: int, peer: str, value: Callable[[Record], float | None], goal: float | None, *, at_least: bool = False
    ) -> str:
        ours, theirs = of("baton", length, value), of(peer, length, value)
        if not pooled(ours) or not pooled(theirs):
            return "—"
        ratio = _ratio(ours, theirs, p50, run)
        return _interval(ratio) if goal is None else _verdict(ratio, goal, at_least=at_least)

    handoff, ttft, undisturbed = [], [], []
    for length in lengths:
        name = f"{length} tokens"
        share = pooled(of("baton", length, _exposed_share))
        goal = None if length < 2000 else EXPOSED_GOAL
        said = ""
        if share:
            said = f"{p50(share):.1%} (p90 {percentile(share, 90):.1%})"
            if length >= 2000:
                said += f"; goal ≤ 5%: **{'met' if p50(share) <= EXPOSED_SHARE_GOAL else 'missed'}**"
        handoff.append(
            [
                name,
                cell("baton", length, _exposed, 1e3, "ms"),
                cell("stock-pd", length, _exposed, 1e3, "ms"),
                compared(length, "stock-pd", _exposed, goal),
                cell("stock-pd-as-shipped", length, _exposed, 1e3, "ms"),
                compared(length, "stock-pd-as-shipped", _exposed, goal),
                said,
            ]
        )
        ttft.append(
            [
                name,
                *(cell(system, length, _ttft, 1e3, "ms") for system in ("baton", "engine", "stock-pd")),
                compared(length, "engine", _ttft, TTFT_GOALS.get(length)),
                *(cell(system, length, _first_gap, 1e3, "ms") for system in ("baton", "engine")),
                *(cell(system, length, _first_decode_step, 1e3, "ms") for system in ("baton", "engine")),
            ]
        )
        undisturbed.append(
            [
                name,
                *(cell(system, length, _prefill_tokens_per_s, 1.0, "/s") for system in ("baton", "engine")),
                compared(length, "engine", _prefill_tokens_per_s, UNDISTURBED_GOAL, at_least=True),
                *(cell(system, length, _decode_step, 1e3, "ms") for system in ("baton", "engine")),
                compared(length, "engine", _decode_step, 1 / UNDISTURBED_GOAL),
            ]
        )
    return [
        "## Exposed handoff",
        "From the end of the prefill's last step to the beginning of the decode's first, by the engines' own clocks.",
        _table(
            (
                "prompt",
                "Baton",
                "stock, tuned",
                "Baton / stock, tuned",
                "stock, as shipped",
                "Baton / stock, as shipped",
                "share of Baton's TTFT",
            ),
            handoff,
        ),
        "## Time to first token, and to the second",
        "Idle systems, one request at a time, from the send. The engine stands on the prefill's core.",
        _table(
            (
                "prompt",
                "Baton",
                "one engine",
                "stock P/D",
                "Baton / one engine",
                "first to second token, Baton",
                "one engine",
                "the decode's first step, Baton",
                "one engine",
            ),
            ttft,
        ),
        "## What the connector costs the engine",
        "The same engine with Baton's connector and with none, by the step clock: tokens of prefill per second, and "
        "the median decode step of an answer without its first (a goal on time is 1 / 0.97). Baton's decode steps "
        "run on the other core.",
        _table(
            (
                "prompt",
                "prefill, Baton",
                "no connector",
                "Baton / none",
                "decode step, Baton",
                "no connector",
                "Baton / none",
            ),
            undisturbed,
        ),
    ]


def _idle_table(idle: Sequence[Record], run: Record) -> str:
    rows = []
    for record in idle:
        if record["record"] == "idle pair":
            name = f"connector: {TITLES[record['path']]}"
            parts = ", ".join(f"{end} {share:.3f}" for end, share in record["cpu_share"].items())
            worst = max(record["cpu_share"].values())
            is_ours = record["path"] in BATON_PATHS
        else:
            name = f"system: {run['titles'][record['system']]}, block {record['block'] + 1}"
            workers = _workers(record["processes"])
            parts = ", ".join(f"engine and its parent {share:.3f}" for share in workers)
            parts += f"; all together {sum(process['cpu_share'] for process in record['processes']):.3f}"
            worst = max(workers, default=0.0)
            is_ours = record["system"] == "baton"
        verdict = f"**{'met' if worst <= IDLE_GOAL else 'missed'}**" if is_ours else ""
        rows.append([name, parts, f"{worst:.3f}", verdict])
    return _table(("what", "cores", "the busiest", "goal for a worker ≤ 0.02"), rows)


def _workers(processes: Sequence[Record]) -> list[float]:
    """CPU of each engine process and of the worker or server process that owns it."""
    shares = {process["pid"]: process["cpu_share"] for process in processes}
    engines = [process for process in processes if process["command"].startswith("VLLM")]
    return [engine["cpu_share"] + shares.get(engine["parent_pid"], 0.0) for engine in engines]


def _how(documents: Sequence[Record], run: Record) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in run["machine"]["packages"].items())
    lines = [
        "- Pairs: holder on the first core, reader on the second; all pairs live throughout and are stopped but for "
        "their turn; turns in mirrored order, reads of a turn shuffled, after one for warmth. Both ends step as an "
        "idle engine does: every millisecond. Content is compared in the first round.",
        "- “As shipped”: vLLM's NIXL connector as it comes, progress thread, four UCX threads, both ends' main "
        "threads on the machine's last core. “Tuned”: no UCX threads, every thread back on its core; the progress "
        "thread cannot be switched off by an option. “No progress thread” (full run) is a patch of ours.",
        f"- Systems in the order {', '.join(run['order'])}, each alive in its block only; the same prompts for all "
        "of a pass; greedy, 12 tokens of output; every engine with 512 tokens a step, blocks of 128, bfloat16, "
        "eager. Stock P/D “tuned” and “as shipped” as in `bench/peers.py`; as shipped it is slow, so it has one "
        "block at the end, of the longest prompts alone.",
        f"- {packages}. Seed {run['seed']}. Raw records: the file named like this page under `docs/evidence/`; "
        "`python -m bench.transfer_figures --report-from` makes this page from it.",
    ]
    for block in (document for document in documents if document["record"] == "block"):
        said = (
            block.get("error")
            or f"others {block['others_share']:.0%} of the machine, steal {block['steal_share']:.1%}"
        )
        lines.append(f"- Block {block['block'] + 1}, {run['titles'][block['system']]}: {said}.")
    lines += [f"- **{d['section']} failed: {d['error']}.**" for d in documents if d["record"] == "failure"]
    return "\n".join(lines)
