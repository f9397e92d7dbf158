"""A finished run as a person reads it in a terminal. Pure: a summary in, something to print out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.generator.progress import milliseconds

_LATENCIES = (
    ("TTFT", "ttft_s"),
    ("TTFT from sending", "service_ttft_s"),
    ("ITL, messages", "itl_message_s"),
    ("ITL, tokens", "itl_token_s"),
    ("TPOT", "tpot_s"),
    ("longest gap", "longest_gap_s"),
    ("E2E", "e2e_s"),
)
_PERCENTS = ("p50", "p90", "p95", "p99", "max")


def run_table(summary: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> RenderableType:
    """Latencies, what became of the requests, throughput, goodput, and whether the run may be believed. ``facts`` of
    the run add its seed, pacer and trace, and the machine."""
    parts: list[RenderableType] = [_latencies(summary)]
    if summary["phases"]:
        parts.append(_phases(summary["phases"]))
    parts += [
        _goodput(summary["goodput"]),
        *_lines(summary),
        *_origin(facts or {}),
        *_machine(facts or {}),
        _verdict(summary["validity"]),
    ]
    return Group(*parts)


def sweep_table(summaries: Sequence[Mapping[str, Any]], slo_name: str | None) -> RenderableType:
    """One line a rate."""
    table = Table(box=box.SIMPLE_HEAD, title="by rate", title_justify="left", pad_edge=False)
    for name in ("requests/s", "TTFT p50", "TTFT p99", "ITL p99", "TPOT p99", "out tokens/s", "OK", "goodput", "is"):
        table.add_column(name, justify="left" if name == "is" else "right", no_wrap=True)
    for summary in summaries:
        latency = summary["latency"]
        goodput = summary["goodput"].get(slo_name) if slo_name else None
        table.add_row(
            _number(summary["rate"]["requested_per_s"]),
            milliseconds(latency["ttft_s"]["p50"]),
            milliseconds(latency["ttft_s"]["p99"]),
            milliseconds(latency["itl_message_s"]["p99"]),
            milliseconds(latency["tpot_s"]["p99"]),
            _number(summary["throughput"]["output_tokens_per_s"]),
            _share(_ok_share(summary)),
            "–" if goodput is None else _share(goodput["share"]),
            summary["saturation"]["verdict"] + ("" if summary["validity"]["valid"] else ", INVALID"),
        )
    return table


def _latencies(summary: Mapping[str, Any]) -> Table:
    title = f"{summary['label']}: {summary['workload']}, times from the intended send time"
    table = Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left", pad_edge=False)
    table.add_column("")
    for name in (*_PERCENTS, "mean", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [(name, summary["latency"][key]) for name, key in _LATENCIES]
    for name, values in (*rows, ("schedule lag", summary["lag_s"])):
        if values["n"]:
            figures = [milliseconds(values[key]) for key in (*_PERCENTS, "mean")]
            table.add_row(name, *figures, str(values["n"]))
    return table


def _phases(phases: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="phases, as the server measured", title_justify="left", pad_edge=False)
    table.add_column("")
    for name in (*_PERCENTS, "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in phases.items():
        table.add_row(escape(name), *(milliseconds(values[key]) for key in (*_PERCENTS, "mean")))
    return table


def _goodput(goodput: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="goodput", title_justify="left", pad_edge=False)
    for name in ("SLO", "TTFT", "TPOT", "longest gap", "good", "95%", "good/s", "failed most by"):
        table.add_column(name, justify="left" if name in ("SLO", "failed most by") else "right", no_wrap=True)
    for name, values in goodput.items():
        table.add_row(
            escape(name),
            milliseconds(values["ttft_s"]),
            milliseconds(values["tpot_s"]),
            milliseconds(values["tail_itl_s"]),
            _share(values["share"]),
            f"{_share(values['low'])} to {_share(values['high'])}",
            _number(values["good_requests_per_s"]),
            values["failed_most_by"] or "",
        )
    return table


def _lines(summary: Mapping[str, Any]) -> list[Text]:
    requests, throughput, rate = summary["requests"], summary["throughput"], summary["rate"]
    ends = ", ".join(
        f"{each['count']} {name} ({_share(each['share'])})"
        for name, each in requests["outcomes"].items()
        if each["count"] or name == "ok"
    )
    window, saturation = summary["window"], summary["saturation"]
    lines = [
        f"requests      {requests['count']} of {requests['planned_count']} planned: {ends}",
        f"rate          {_number(rate['requested_per_s'])} requests/s asked for, "
        f"{_share(rate['achieved_share'])} of it sent",
        f"throughput    {_number(throughput['requests_per_s'])} requests/s, "
        f"{_number(throughput['input_tokens_per_s'])} tokens/s in, "
        f"{_number(throughput['output_tokens_per_s'])} tokens/s out",
        f"window        {window['start_s']:.1f} to {window['end_s']:.1f} s, {window['request_count']} requests; "
        f"warm-up: {summary['warmup']['verdict']}",
        f"saturation    {saturation['verdict']}: {saturation['reason']}",
    ]
    if summary["placements"]:
        lines.append("placement     " + ", ".join(f"{n} {name}" for name, n in summary["placements"].items()))
    if summary["cache"]["share"]:
        lines.append(f"prefix cache  {_share(summary['cache']['share'])} of prompt tokens were cached")
    lines += [f"failed        {count}x {words}" for words, count in requests["errors"].items()]
    if summary["sample_size"]["warning"]:
        lines.append(f"note          {summary['sample_size']['warning']}")
    return [Text(line) for line in lines]


def _origin(facts: Mapping[str, Any]) -> list[Text]:
    """What makes the same plan again: two runs of other traffic are not to be held against each other."""
    plan = facts.get("plan", {})
    lines = []
    if "seed" in plan:
        lines.append(f"seed          {plan['seed']}")
    if pacer := plan.get("pacer"):
        lines.append(f"pacer         {pacer['spelling']}")
    if trace := plan.get("trace"):
        lines.append(f"trace         {trace['name']}, sha256 {trace['sha256']}")
    return [Text(line) for line in lines]


def _machine(facts: Mapping[str, Any]) -> list[Text]:
    during = facts.get("machine", {}).get("during")
    if not during:
        return []
    lines = [
        f"machine       {_share(during['busy_share'])} busy, {_share(during['steal_share'])} stolen; "
        f"the generator used {during['generator_cpu_s']:.1f} s of CPU",
        f"timeline      {facts['timeline']['said']} ({facts['timeline']['sample_count']} samples)",
    ]
    return [Text(line) for line in lines]


def _verdict(validity: Mapping[str, Any]) -> RenderableType:
    if validity["valid"]:
        return Text("valid         yes", style="green")
    return Text("\n".join(f"INVALID       {reason}" for reason in validity["reasons"]), style="bold red")


def _ok_share(summary: Mapping[str, Any]) -> float | None:
    ok = summary["requests"]["outcomes"].get("ok")
    return None if ok is None else ok["share"]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
