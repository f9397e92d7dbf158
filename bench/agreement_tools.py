"""Three load generators given the same load: their command lines, and their figures under common names.

Owns how ``vllm bench serve`` and aiperf are told times, lengths and counts, and what their words mean. Their figures
are taken as they report them; nothing is computed again, except for ours, which is computed here over all requests as
they do, since a report of ours may cut a warm-up.

    name        ours                              vllm bench serve     aiperf
    ttft        from the intended time            ttft, from sending   time_to_first_token, from sending
    itl         between messages                  itl                  inter_chunk_latency
    tpot        (last - first) / (tokens - 1)     tpot                 inter_token_latency
    e2e         intended time to last token       e2el, from sending   request_latency, from sending
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.generator.golden import GoldenRecord
from bench.results.records import Outcome, RequestRecord
from bench.results.run_data import RunData
from bench.results.summary import GAP_METRICS, REQUEST_METRICS
from bench.traffic.plan import Plan, PlannedRequest

OURS, VLLM, AIPERF = "baton", "vllm", "aiperf"
TOOLS = (OURS, VLLM, AIPERF)
TITLES = {OURS: "baton bench run", VLLM: "vllm bench serve", AIPERF: "aiperf"}
DISTRIBUTIONS = ("ttft", "itl", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p99")
RATES = ("requests_per_s", "output_tokens_per_s")
TIMEOUT_S = 60.0

Figures = dict[str, float]
"""By name: "ttft_mean" ... "e2e_p99" in milliseconds, the rates, and "completed" requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every tool is told."""

    url: str
    model: str
    tokenizer: str
    """A folder; both others insist on one."""
    times_s: tuple[float, ...]
    prompt_token_count: int
    output_token_count: int
    seed: int


def poisson_times(rate_per_s: float, duration_s: float, seed: int) -> tuple[float, ...]:
    """The first at 0, so that everybody's clock starts with a request; to the millisecond, as aiperf keeps them."""
    rng = random.Random(seed)  # noqa: S311  # a load to be made again
    times = [0.0]
    while times[-1] < duration_s:
        times.append(round(times[-1] + rng.expovariate(rate_per_s), 3))
    return tuple(times[:-1])


def plan_of(load: Load) -> Plan:
    rng = random.Random(load.seed)  # noqa: S311
    requests = tuple(
        PlannedRequest(
            index=index,
            at_s=at_s,
            prompt_token_ids=tuple(rng.randrange(1000, 40_000) for _ in range(load.prompt_token_count)),
            output_token_count=load.output_token_count,
        )
        for index, at_s in enumerate(load.times_s)
    )
    return Plan(name="agreement", requests=requests, duration_s=load.times_s[-1] + 1e-3, facts={"seed": load.seed})


def command_of(tool: str, load: Load, directory: Path, aiperf: Path) -> list[str]:
    """The command line of ``tool``, with the files it needs written to ``directory``."""
    match tool:
        case "vllm":
            return _vllm_command(load, directory)
        case "aiperf":
            return _aiperf_command(load, directory, aiperf)
        case _:
            spec = directory / "load.json"
            spec.write_text(json.dumps(asdict(load)))
            return [sys.executable, "-m", "bench.agreement_tools", str(spec), str(directory / "run")]


def _as_ours(load: Load) -> dict[str, Any]:
    """What ours sends and the others would not, sent by all: each of it is a little work of the server."""
    usage = {"include_usage": True, "continuous_usage_stats": True}
    return {"min_tokens": load.output_token_count, "stream_options": usage}


def environment_of(tool: str) -> dict[str, str]:
    """Nothing leaves the machine. aiperf finds a tokenizer in a folder only while it is not told to be offline, and
    asks nobody then."""
    environment = {**os.environ, "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    if tool == VLLM:
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return environment


def _vllm_command(load: Load, directory: Path) -> list[str]:
    trace = directory / "trace.jsonl"
    trace.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": at_s,
                    "input_length": load.prompt_token_count,
                    "output_length": load.output_token_count,
                    "hash_ids": [index],  # one block of its own each: no two prompts alike
                }
            )
            + "\n"
            for index, at_s in enumerate(load.times_s)
        )
    )
    options: dict[str, Any] = {
        "backend": "openai",
        "base-url": load.url,
        "model": load.model,
        "tokenizer": load.tokenizer,
        "dataset-name": "timed_trace",
        "dataset-path": trace,
        "timed-trace-chunk-hash-size": load.prompt_token_count,
        "num-prompts": len(load.times_s),
        "seed": load.seed,
        "temperature": 0,
        "extra-body": json.dumps(_as_ours(load)),
        "ready-check-timeout-sec": 0,  # or it would send one more request first
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "metric-percentiles": "50,99",
        "result-dir": directory,
        "result-filename": "result.json",
    }
    command = [sys.executable, "-m", "bench.vllm_bench_serve", "--save-result", "--disable-tqdm"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return command


def _aiperf_command(load: Load, directory: Path, aiperf: Path) -> list[str]:
    trace = directory / "trace.jsonl"
    with trace.open("w") as lines:
        for request in plan_of(load).requests:
            payload = {
                "model": load.model,
                "prompt": list(request.prompt_token_ids),
                "max_tokens": load.output_token_count,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                **_as_ours(load),
            }
            lines.write(json.dumps({"timestamp": request.at_s * 1e3, "payload": payload}) + "\n")
    options: dict[str, Any] = {
        "model": load.model,
        "url": load.url,
        "endpoint-type": "completions",
        "custom-dataset-type": "mooncake-trace",
        "input-file": trace,
        "tokenizer": load.tokenizer,
        "ui-type": "none",
        "export-level": "summary",
        "artifact-dir": directory / "artifacts",
    }
    command = [str(aiperf), "profile", "--streaming", "--fixed-schedule", "--use-server-token-count"]
    command += ["--no-gpu-telemetry", "--no-server-metrics"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return command


def figures_of(tool: str, directory: Path) -> Figures:
    """What ``tool`` reported. Raises ``OSError``, ``KeyError`` or ``ValueError`` where it did not."""
    match tool:
        case "vllm":
            return _figures_of_vllm(json.loads((directory / "result.json").read_text()))
        case "aiperf":
            return _figures_of_aiperf(json.loads((directory / "artifacts/profile_export_aiperf.json").read_text()))
        case _:
            from bench.results.store import read_run

            return figures_of_ours(read_run(directory / "run"))


def _figures_of_vllm(result: Mapping[str, Any]) -> Figures:
    found: Figures = {
        "requests_per_s": result["request_throughput"],
        "output_tokens_per_s": result["output_throughput"],
        "completed": result["completed"],
    }
    for name, theirs in (("ttft", "ttft"), ("itl", "itl"), ("tpot", "tpot"), ("e2e", "e2el")):
        for statistic in STATISTICS:
            found[f"{name}_{statistic}"] = result[f"{statistic}_{theirs}_ms"]
    return found


def _figures_of_aiperf(result: Mapping[str, Any]) -> Figures:
    found: Figures = {
        "requests_per_s": result["request_throughput"]["avg"],
        "output_tokens_per_s": result["output_token_throughput"]["avg"],
        "completed": result["request_count"]["avg"],
    }
    names = {
        "ttft": "time_to_first_token",
        "itl": "inter_chunk_latency",
        "tpot": "inter_token_latency",
        "e2e": "request_latency",
    }
    for name, theirs in names.items():
        if result[theirs]["unit"] != "ms":
            raise ValueError(f"{theirs} is in {result[theirs]['unit']}")
        for statistic, key in (("mean", "avg"), ("p50", "p50"), ("p99", "p99")):
            found[f"{name}_{statistic}"] = result[theirs][key]
    return found


def figures_of_ours(data: RunData) -> Figures:
    """Of all requests, as the others do: no warm-up is cut. Rates over the time from the first sending to the last
    token, as theirs are."""
    records = [record for record in data.records if record.outcome is Outcome.OK]
    values = {
        "ttft": [REQUEST_METRICS["ttft_s"](record) for record in records],
        "itl": [gap for record in records for gap in GAP_METRICS["itl_message_s"](record)],
        "tpot": [REQUEST_METRICS["tpot_s"](record) for record in records],
        "e2e": [REQUEST_METRICS["e2e_s"](record) for record in records],
    }
    found = _statistics({name: [one for one in each if one is not None] for name, each in values.items()})
    span_s = max(r.message_at_s[-1] for r in records) - min(r.sent_at_s for r in records)
    found["requests_per_s"] = len(records) / span_s
    found["output_tokens_per_s"] = sum(record.output_token_count for record in records) / span_s
    found["completed"] = len(records)
    found["lag_p99"] = float(np.quantile([record.lag_s for record in data.records], 0.99)) * 1e3
    return found


def truth_of(notes: Sequence[GoldenRecord]) -> Figures:
    """The same figures from the golden server's notes: from the receipt of a request to the sending of its tokens.
    What a tool reports more than this is the way there and back, and the tool."""
    whole = [note for note in notes if note.ending == "complete"]
    found = _statistics(
        {
            "ttft": [note.sent_at_s[0] - note.received_at_s for note in whole],
            "itl": [gap for note in whole for gap in np.diff(note.sent_at_s)],
            "tpot": [(note.sent_at_s[-1] - note.sent_at_s[0]) / (note.output_token_count - 1) for note in whole],
            "e2e": [note.sent_at_s[-1] - note.received_at_s for note in whole],
        }
    )
    span_s = max(note.sent_at_s[-1] for note in whole) - min(note.received_at_s for note in whole)
    found["requests_per_s"] = len(whole) / span_s
    found["output_tokens_per_s"] = sum(note.output_token_count for note in whole) / span_s
    found["completed"] = len(whole)
    return found


def _statistics(values_s: Mapping[str, Sequence[float]]) -> Figures:
    found: Figures = {}
    for name, values in values_s.items():
        p50, p99 = np.quantile(values, (0.5, 0.99)) * 1e3
        found |= {f"{name}_mean": float(np.mean(values)) * 1e3, f"{name}_p50": float(p50), f"{name}_p99": float(p99)}
    return found


async def _measure(load: Load, directory: Path) -> list[RequestRecord]:
    from bench.generator.measure import Measurement, measure
    from bench.generator.openai_target import OpenAiTarget

    target = OpenAiTarget(load.url, load.model)
    measurement = Measurement(
        label="agreement",
        target={"kind": "openai", "address": load.url},
        model=load.model,
        timeout_s=TIMEOUT_S,
        is_quiet=True,
    )
    try:
        return (await measure(plan_of(load), target, directory, measurement)).records
    finally:
        await target.close()


def main(arguments: Sequence[str]) -> None:
    """Our own generator as a process: a load's file, and where the run goes."""
    from baton.event_loop import runner

    fields = json.loads(Path(arguments[0]).read_text())
    load = Load(**{**fields, "times_s": tuple(fields["times_s"])})
    with runner() as loop_runner:
        loop_runner.run(_measure(load, Path(arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
