"""How late the load generator is: 200 requests/s of 50 tokens, so 10,000 tokens/s, from one core.

    python -m bench.schedule_lag            # HTTP and gRPC, 30 s each; writes docs/benchmarks/schedule-lag.md
    python -m bench.schedule_lag --quick    # 8 s each; prints only

The generator is what ``baton bench run`` runs (``generator/measure.py``: records written, progress counted), in a
process of its own pinned to one core. The golden server is pinned to another; its notes say when each request arrived
there and when each token was sent, on the same clock. Exit status: 0 when all was sent and counted, 1 otherwise; a
goal that is missed is a figure and no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baton.__main__ import BENCH_RUN_EXPERIMENTS
from baton.event_loop import runner
from bench.children import Child
from bench.generator.baton_target import BatonTarget
from bench.generator.golden import GoldenScript
from bench.generator.golden_judge import judge
from bench.generator.golden_server import GoldenProcess, golden_process
from bench.generator.measure import Measurement, measure
from bench.generator.openai_target import OpenAiTarget
from bench.generator.target import Target
from bench.machine import machine_facts
from bench.results.run_data import RunData
from bench.traffic.plan import Plan, PlannedRequest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/benchmarks/schedule-lag.md"
RAW = ROOT / "docs/evidence/schedule-lag.json"
PROTOCOLS = ("http", "grpc")
GOAL_LAG_P99_MS = 1.0
PROMPT_TOKEN_COUNT = 64
TTFT_S, GAP_S, GAP_JITTER_SHARE = 0.05, 0.01, 0.5
RAMP_S = 1.0
"""Cut off both ends of the window over which tokens/s is counted: by then all streams run, and none has ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a terminated benchmark must still end its servers
    if options.only:
        result = run_one(options.only, options.rate, options.tokens, options.duration, options.seed, options.cores)
        options.raw.write_text(json.dumps(result))
        return 0
    duration_s = 8.0 if options.quick else options.duration
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for protocol in options.protocols:
            results[protocol] = _in_a_process(protocol, options, duration_s, Path(scratch))
            print(json.dumps({"protocol": protocol, **results[protocol]}, indent=1), flush=True)
    raw = {
        "machine": machine_facts(),
        "load": {
            "rate_per_s": options.rate,
            "output_token_count": options.tokens,
            "prompt_token_count": PROMPT_TOKEN_COUNT,
            "duration_s": duration_s,
            "seed": options.seed,
            "pacer": "Poisson",
            "ttft_s": TTFT_S,
            "gap_s": GAP_S,
            "gap_jitter_share": GAP_JITTER_SHARE,
        },
        "results": results,
    }
    if not options.quick:
        options.raw.write_text(json.dumps(raw, indent=1) + "\n")
        options.page.write_text(page(raw))
        print(options.page)
    is_clean = all(not result["miscounts"] and set(result["outcomes"]) == {"ok"} for result in results.values())
    return 0 if is_clean else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The lag of the load generator against the golden server.")
    parser.add_argument("--rate", type=float, default=200.0, help="requests/s (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=50, help="of each answer (default: %(default)s)")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="8 s each, writes nothing")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    parser.add_argument("--cores", type=int, nargs=2, metavar=("GENERATOR", "SERVER"), default=_default_cores())
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--raw", type=Path, default=RAW)
    parser.add_argument("--only", choices=PROTOCOLS, help=argparse.SUPPRESS)  # what the pinned process is told
    return parser.parse_args(arguments)


def _default_cores() -> tuple[int, int]:
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1]


def _in_a_process(protocol: str, options: argparse.Namespace, duration_s: float, scratch: Path) -> dict[str, Any]:
    """Affinity is given before the process starts, so that every thread has it. Raises ``ChildError``."""
    raw = scratch / f"{protocol}.json"
    command = [sys.executable, "-m", "bench.schedule_lag", "--only", protocol, "--raw", str(raw)]
    command += ["--rate", str(options.rate), "--tokens", str(options.tokens), "--duration", str(duration_s)]
    command += ["--seed", str(options.seed), "--cores", *map(str, options.cores)]
    child = Child(
        f"generator over {protocol}",
        command,
        environment={"GRPC_EXPERIMENTS": BENCH_RUN_EXPERIMENTS, **os.environ},  # as the command has it
        log_path=scratch / f"{protocol}.log",
        cores=options.cores[:1],
    )
    try:
        _wait(child, duration_s + 90.0)
        if not raw.exists():
            raise child.failed("ended without a result")
        return dict(json.loads(raw.read_text()))
    finally:
        child.stop()


def _wait(child: Child, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while child.is_running():
        if time.monotonic() > deadline:
            raise child.failed(f"did not end within {limit_s:.0f} s")
        time.sleep(0.2)


def plan_of(rate_per_s: float, output_token_count: int, duration_s: float, seed: int) -> Plan:
    """Poisson arrivals; every prompt is another."""
    rng = random.Random(seed)  # noqa: S311  # a load to be made again
    requests: list[PlannedRequest] = []
    at_s = rng.expovariate(rate_per_s)
    while at_s < duration_s:
        index = len(requests)
        prompt = (0, index, *(rng.randrange(300, 40_000) for _ in range(PROMPT_TOKEN_COUNT - 2)))
        requests.append(
            PlannedRequest(index=index, at_s=at_s, prompt_token_ids=prompt, output_token_count=output_token_count)
        )
        at_s += rng.expovariate(rate_per_s)
    facts = {"pacer": "poisson", "rate_per_s": rate_per_s, "seed": seed}
    return Plan(name="schedule-lag", requests=tuple(requests), duration_s=duration_s, facts=facts)


def run_one(
    protocol: str, rate_per_s: float, output_token_count: int, duration_s: float, seed: int, cores: Sequence[int]
) -> dict[str, Any]:
    """One protocol, in this process, which is on ``cores[0]`` already; the server goes to ``cores[1]``."""
    plan = plan_of(rate_per_s, output_token_count, duration_s, seed)
    script = GoldenScript(ttft_s=TTFT_S, gap_s=GAP_S, gap_jitter_share=GAP_JITTER_SHARE, seed=seed)
    with golden_process(script, cores=cores[1:]) as server, tempfile.TemporaryDirectory() as scratch:
        data, cpu_s = _measured(plan, server, protocol, Path(scratch) / "run")
        notes = server.drain()
    judgement = judge(plan, data.records, notes, zero_at_s=data.facts["zero_at_monotonic_s"])
    outcomes: dict[str, int] = {}
    for record in data.records:
        outcomes[record.outcome.value] = outcomes.get(record.outcome.value, 0) + 1
    begin_s, end_s = RAMP_S, duration_s - RAMP_S
    token_count = sum(
        count
        for record in data.records
        for at_s, count in zip(record.message_at_s, record.message_token_counts, strict=True)
        if begin_s <= at_s < end_s
    )
    during = data.facts["machine"]["during"]
    return {
        "request_count": len(data.records),
        "outcomes": outcomes,
        "miscounts": judgement.miscounts[:20],
        "is_valid": data.facts["valid"],
        "invalid_reasons": data.facts["invalid_reasons"],
        "planned_rate_per_s": len(plan.requests) / duration_s,
        "achieved_share": data.facts["schedule"]["achieved_share"],
        "tokens_per_s": token_count / (end_s - begin_s),
        "lag_ms": _quantiles([record.lag_s for record in data.records]),
        "arrival_lag_ms": _quantiles(judgement.arrival_lag_s),
        "message_delay_ms": _quantiles(judgement.message_delay_s),
        "gap_error_ms": _quantiles([abs(error) for error in judgement.gap_error_s]),
        "server_lateness_ms": _quantiles(judgement.server_lateness_s),
        "generator_cpu_share": cpu_s / duration_s,
        "busy_share": during["busy_share"],
        "steal_share": during["steal_share"],
        "involuntary_switch_count": during["generator_involuntary_switch_count"],
    }


def _measured(plan: Plan, server: GoldenProcess, protocol: str, directory: Path) -> tuple[RunData, float]:
    """The run, and the CPU seconds that sending and receiving took, all threads counted."""

    async def main() -> RunData:
        target: Target
        if protocol == "grpc":
            address, target = server.grpc_address, BatonTarget(server.grpc_address)
        else:
            address, target = server.url, OpenAiTarget(server.url, "golden")
        measurement = Measurement(
            label="schedule lag",
            target={"kind": protocol, "address": address},
            model="golden",
            timeout_s=30.0,
            is_quiet=True,
        )
        try:
            return await measure(plan, target, directory, measurement)
        finally:
            await target.close()

    with runner() as loop_runner:
        data = loop_runner.run(main())
    return data, float(data.facts["machine"]["during"]["generator_cpu_s"])


def _quantiles(values_s: Sequence[float]) -> dict[str, float]:
    if not values_s:
        return {}
    found = np.quantile(values_s, (0.5, 0.9, 0.99, 0.999, 1.0)) * 1e3
    return dict(zip(("p50", "p90", "p99", "p99.9", "max"), (round(float(value), 4) for value in found), strict=True))


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("requests sent", lambda r: f"{r['request_count']:,}, of them ok {r['outcomes'].get('ok', 0):,}"),
    ("requests/s planned, share achieved", lambda r: f"{r['planned_rate_per_s']:.1f}, {r['achieved_share']:.4f}"),
    ("tokens/s received", lambda r: f"{r['tokens_per_s']:,.0f}"),
    ("requests or messages counted otherwise than sent", lambda r: f"{len(r['miscounts'])}"),
    ("schedule lag p50, ms", lambda r: f"{r['lag_ms']['p50']:.3f}"),
    ("**schedule lag p99, ms** (goal: at most 1)", lambda r: _against_goal(r["lag_ms"]["p99"])),
    ("schedule lag p99.9, max, ms", lambda r: f"{r['lag_ms']['p99.9']:.2f}, {r['lag_ms']['max']:.2f}"),
    (
        "the same at the server, on arrival: p50, p99, ms",
        lambda r: f"{r['arrival_lag_ms']['p50']:.3f}, {r['arrival_lag_ms']['p99']:.2f}",
    ),
    (
        "token sent to token stamped: p50, p99, ms",
        lambda r: f"{r['message_delay_ms']['p50']:.3f}, {r['message_delay_ms']['p99']:.2f}",
    ),
    ("error of a gap: p50, p99, ms", lambda r: f"{r['gap_error_ms']['p50']:.3f}, {r['gap_error_ms']['p99']:.2f}"),
    (
        "the server's own lateness: p50, p99, ms",
        lambda r: f"{r['server_lateness_ms']['p50']:.3f}, {r['server_lateness_ms']['p99']:.2f}",
    ),
    ("CPU of the generator, share of its core", lambda r: f"{r['generator_cpu_share']:.0%}"),
    ("steal, share of the machine", lambda r: f"{r['steal_share']:.1%}"),
)


def _against_goal(p99_ms: float) -> str:
    return f"**{p99_ms:.3f}** ({'met' if p99_ms <= GOAL_LAG_P99_MS else 'missed'})"


def page(raw: dict[str, Any]) -> str:
    """The page, from what is in the raw file."""
    load, machine, results = raw["load"], raw["machine"], raw["results"]
    titles = {"http": "OpenAI-compatible HTTP", "grpc": "Baton over gRPC"}
    lines = [
        "# How late the load generator is",
        "",
        "Made by `python -m bench.schedule_lag`; raw figures in [schedule-lag.json](../evidence/schedule-lag.json).",
        "",
        f"{load['pacer']} arrivals of {load['rate_per_s']:g} requests/s for {load['duration_s']:g} s, "
        f"{load['prompt_token_count']} tokens in and {load['output_token_count']} out each, so "
        f"{load['rate_per_s'] * load['output_token_count']:,.0f} tokens/s, one message a token. First token after "
        f"{load['ttft_s'] * 1e3:g} ms, gaps of {load['gap_s'] * 1e3:g} ms, each varied by up to "
        f"{load['gap_jitter_share']:.0%}. The generator, all its threads, is pinned to one core; the golden server, "
        "which notes what it sends and when, to another.",
        "",
        "| | " + " | ".join(titles[name] for name in results) + " |",
        "|---|" + "---:|" * len(results),
        *(
            f"| {title} | " + " | ".join(value(result) for result in results.values()) + " |"
            for title, value in _ROWS
        ),
        "",
        "Schedule lag: from the intended time of a request to the moment it was sent. Every latency of a report "
        "counts from the intended time, so lag is in the latencies and not hidden by them; a run whose lag is "
        "above 5 ms at "
        "p99 is marked invalid. Token stamps are compared with the server's own, taken just before each was sent.",
        "",
        f"Machine: {machine['cpu_model']}, {machine['core_count']} cores, kernel {machine['kernel']}, Python "
        f"{machine['python']}, grpcio {machine['packages']['grpcio']}, aiohttp {machine['packages']['aiohttp']}; "
        f"commit {machine['commit']}; {machine['at']}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
