"""What the handoff costs: Baton's transfer path beside stock vLLM's, raw NIXL and memcpy, in one run.

    python -m bench.transfer_figures --quick                   # under four minutes on a quiet machine
    python -m bench.transfer_figures                           # mirrored blocks, about eighteen minutes
    python -m bench.transfer_figures --sections pairs          # bandwidth and idle CPU of the connectors alone

Three sections. *pairs*: two processes per path move KV without a model around them (``bench/transfer_pairs.py``).
*tcp*: such pairs in two network namespaces (``bench/tcp_pairs.py``); needs root, and says so where it cannot be run.
*systems*: Baton 1P+1D, one vLLM engine on the prefill's core and stock vLLM P/D answer requests one at a time, with a
scheduler that notes every engine step (``bench/step_clock.py``). Systems take turns in mirrored blocks. Every reading
goes to the raw file as it is taken; the report is made from that file alone (--report-from).

Exit status: 0 when everything ran and no request failed, 1 otherwise. A figure that misses its goal is no failure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from baton.request import Role
from bench import raw_file
from bench.comparison.blocks import block_order
from bench.cores import CLOCK_VARIABLE
from bench.generator.baton_target import BatonTarget
from bench.generator.openai_target import OpenAiTarget
from bench.generator.target import ServerFacts, Target, TargetError, Tokens
from bench.kv_pair import BLOCK_BYTES, LAYER_COUNT, PAGE_BYTES, PATHS, WITHOUT_DIGESTS
from bench.machine import MachineClock, machine_facts, wait_until_quiet
from bench.oracle import model_limits
from bench.peers import SYSTEMS, RunningSystem, SystemSpec, role_cores, start_system
from bench.real_fleet import free_ports
from bench.tcp_pairs import tcp_records
from bench.traffic.plan import PlannedRequest
from bench.transfer_pairs import BLOCK_COUNTS, pair_records
from bench.transfer_report import render
from fleet.config import FleetConfig, check_model_directory, parse_config

SECTIONS = ("pairs", "tcp", "systems")
QUICK_PATHS = ("baton", WITHOUT_DIGESTS, "stock-as-shipped", "stock-tuned", "raw")
COMPARED = (
    SYSTEMS["baton"],
    replace(SYSTEMS["engine"], max_batched_token_count=512, title="one vLLM engine, one core, no connector"),
    SYSTEMS["stock-pd"],
)
AS_SHIPPED = SYSTEMS["stock-pd-as-shipped"]
"""Slow, so it is asked the longest prompts alone, after the others."""
PROMPT_TOKEN_COUNTS = (64, 512, 2000)
COUNTS = {False: (12, 12, 8), True: (6, 4, 3)}
"""Requests of each length in a block, by whether the run is quick."""
AS_SHIPPED_COUNTS = {False: (0, 0, 6), True: (0, 0, 3)}
OUTPUT_TOKEN_COUNT = 12
WARM_UP = (64, 2000, 64)
SETTLE_S = 0.2
IDLE_S = 6.0
REQUEST_TIMEOUT_S = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.report_from is not None:
        options.report.write_text(
            render([document for path in options.report_from for document in raw_file.read(path)])
        )
        print(options.report)
        return 0
    raw_file.end_on_sigterm()
    for path in (options.out, options.report):
        path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="transfer-figures-") as folder, options.out.open("w") as raw:
        config_path = Path(folder) / "baton.toml"
        config_path.write_text(_configuration(options.model, Path(folder) / "state"))
        config = parse_config(config_path.read_text())
        check_model_directory(config)
        order = [*block_order(COMPARED, 1 if options.quick else 2), AS_SHIPPED]
        raw_file.write(raw, _run_facts(options, config, order))
        is_good = True
        if "pairs" in options.sections:
            is_good &= _run_pairs(options, config, raw)
        if "tcp" in options.sections:
            is_good &= _run_tcp(options, config, raw)
        if "systems" in options.sections:
            clock = Path(folder) / "steps.jsonl"
            os.environ[CLOCK_VARIABLE] = str(clock)  # the engines inherit it
            for number, spec in enumerate(order):
                is_good &= _run_block(number, spec, options, config, config_path, clock, raw)
    text = render(raw_file.read(options.out))
    options.report.write_text(text)
    print(text)
    return 0 if is_good else 1


def _configuration(model: Path, state_dir: Path) -> str:
    listen, admin, metrics = free_ports(3)
    engine = """
        kv_cache_bytes = 536870912
        max_batched_token_count = 512
        extra_args = { scheduler_cls = "bench.step_clock_baton.ClockedPullFirst" }
    """
    return f"""
        [cluster]
        runner = "local"
        state_dir = "{state_dir}"
        [model]
        name = "smollm2-135m-instruct"
        path = "{model.expanduser()}"
        [router]
        listen_address = "127.0.0.1:{listen}"
        admin_address = "127.0.0.1:{admin}"
        metrics_address = "127.0.0.1:{metrics}"
        [prefill]
        count = 1
        cores_per_worker = 1
        [prefill.engine]{engine}
        [decode]
        count = 1
        cores_per_worker = 1
        [decode.engine]{engine}
    """


def _run_pairs(options: argparse.Namespace, config: FleetConfig, raw: TextIO) -> bool:
    raw_file.say("pairs: starting")
    cores = [role_cores(config, role)[0] for role in (Role.PREFILL, Role.DECODE)]
    paths = QUICK_PATHS if options.quick else PATHS
    model = Path(config.engines[Role.PREFILL].model_path)
    round_count = 12 if options.quick else 30
    before = MachineClock.read()
    try:
        for block_token_count in BLOCK_COUNTS:
            named = {"round_count": round_count, "seed": options.seed, "block_token_count": block_token_count}
            for record in pair_records(paths, model, cores, options.logs, **named):
                raw_file.write(raw, record)
    except Exception as error:
        raw_file.say(f"pairs failed: {error}")
        raw_file.write(raw, {"record": "failure", "section": "pairs", "error": type(error).__name__})
        return False
    use = MachineClock.read().use_since(before, 0.0)
    raw_file.write(raw, {"record": "machine", "section": "pairs", "steal_share": round(use.steal_share, 4)})
    return True


def _run_tcp(options: argparse.Namespace, config: FleetConfig, raw: TextIO) -> bool:
    raw_file.say("tcp: starting")
    cores = [role_cores(config, role)[0] for role in (Role.PREFILL, Role.DECODE)]
    model = Path(config.engines[Role.PREFILL].model_path)
    round_count = 6 if options.quick else 15
    try:
        for record in tcp_records(model, cores, options.logs, round_count=round_count, seed=options.seed):
            raw_file.write(raw, record)
    except Exception as error:  # where there are no namespaces, too: a run without them has not shown its figures
        raw_file.say(f"tcp failed: {error}")
        raw_file.write(raw, {"record": "failure", "section": "tcp", "error": type(error).__name__})
        return False
    return True


def _run_block(
    number: int,
    spec: SystemSpec,
    options: argparse.Namespace,
    config: FleetConfig,
    config_path: Path,
    clock: Path,
    raw: TextIO,
) -> bool:
    report: dict[str, Any] = {"record": "block", "block": number, "system": spec.name}
    report["busy_share_before"] = round(wait_until_quiet(options.wait_quiet_s), 3)
    raw_file.say(f"{spec.title}: starting ({report['busy_share_before']:.0%} busy before)")
    clock.write_text("")
    if spec.kind != "baton":
        # The same clock in vLLM's own scheduler: a peer loads nothing of ours.
        stock = {"scheduler_cls": "bench.step_clock.ClockedScheduler"}
        engines = {role: replace(engine, extra_args=stock) for role, engine in config.engines.items()}
        config = replace(config, engines=engines)
    try:
        system = start_system(spec, config, config_path, options.logs)
    except Exception as error:
        raw_file.say(f"{spec.title} did not start: {error}")
        raw_file.write(raw, {**report, "error": f"did not start: {type(error).__name__}"})
        return False
    before, own = MachineClock.read(), system.cpu().total_s + time.process_time()
    try:
        records = asyncio.run(_requests(system, config, options, number))
        report["error"] = None
    except Exception as error:
        raw_file.say(f"{spec.title} failed: {error}")
        records, report["error"] = [], type(error).__name__
    use = MachineClock.read().use_since(before, system.cpu().total_s + time.process_time() - own)
    system.stop()
    steps = [json.loads(line) for line in clock.read_text().splitlines()]
    for record in records:
        if record["record"] == "request":
            ended_at = record["ended_at"]
            record["steps"] = [s for s in steps if record["sent_at"] <= s["began_at"] and s["ended_at"] <= ended_at]
        raw_file.write(raw, {**record, "block": number, "system": spec.name})
    shares = {"others_share": round(use.others_share, 4), "steal_share": round(use.steal_share, 4)}
    raw_file.write(raw, {**report, **shares, "facts": system.facts})
    return report["error"] is None and not any(record.get("error") for record in records)


async def _requests(
    system: RunningSystem, config: FleetConfig, options: argparse.Namespace, number: int
) -> list[dict[str, Any]]:
    """Warm-up, idle CPU, then requests one at a time."""
    spec = system.spec
    vocab_size, _ = model_limits(config.model.directory)
    target: Target = (
        BatonTarget(system.target_address)
        if spec.kind == "baton"
        else OpenAiTarget(system.target_address, config.model.name)
    )
    # The same prompts for every system of a pass.
    rng = random.Random(f"{options.seed}/{number // len(COMPARED)}")  # noqa: S311
    counts = (AS_SHIPPED_COUNTS if spec is AS_SHIPPED else COUNTS)[options.quick]
    lengths = [n for n, count in zip(PROMPT_TOKEN_COUNTS, counts, strict=True) for _ in range(count)]
    rng.shuffle(lengths)
    records: list[dict[str, Any]] = []
    async with aclosing(_Closing(target)):
        for length in WARM_UP:
            await _request(target, rng.choices(range(1000, vocab_size), k=length))
        await asyncio.sleep(1.0)
        before, began = system.by_process(), time.monotonic()
        await asyncio.sleep(IDLE_S)
        span_s = time.monotonic() - began
        records.append({"record": "idle system", "processes": _idle_shares(before, system.by_process(), span_s)})
        for index, length in enumerate(lengths):
            await asyncio.sleep(SETTLE_S)
            record = await _request(target, rng.choices(range(1000, vocab_size), k=length))
            records.append({"record": "request", "index": index, **record})
            system.assert_running()
    return records


def _idle_shares(
    before: Mapping[int, tuple[str, int, float]], after: Mapping[int, tuple[str, int, float]], span_s: float
) -> list[dict[str, Any]]:
    return [
        {
            "pid": pid,
            "parent_pid": parent,
            "command": command,
            "cpu_share": round((cpu_s - before[pid][2]) / span_s, 4),
        }
        for pid, (command, parent, cpu_s) in after.items()
        if pid in before
    ]


class _Closing:
    """A target for ``aclosing``."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def aclose(self) -> None:
        await self._target.close()


async def _request(target: Target, prompt: Sequence[int]) -> dict[str, Any]:
    """Times in seconds of CLOCK_MONOTONIC, as the step clock's."""
    request = PlannedRequest(index=0, at_s=0.0, prompt_token_ids=tuple(prompt), output_token_count=OUTPUT_TOKEN_COUNT)
    record: dict[str, Any] = {"prompt_token_count": len(prompt), "sent_at": round(time.monotonic(), 6)}
    arrivals: list[float] = []
    try:
        async with aclosing(target.generate(request, timeout_s=REQUEST_TIMEOUT_S)) as events:
            async for event in events:
                match event:
                    case Tokens():
                        arrivals += [round(time.monotonic(), 6)] * event.token_count
                    case ServerFacts():
                        record["notes"] = {name: each for name, each in asdict(event).items() if each is not None}
    except TargetError as error:
        record["error"] = str(error)
    return {**record, "token_at": arrivals, "ended_at": round(time.monotonic(), 6)}


def _run_facts(options: argparse.Namespace, config: FleetConfig, order: Sequence[SystemSpec]) -> dict[str, Any]:
    return {
        "record": "run",
        "machine": machine_facts(),
        "seed": options.seed,
        "is_quick": options.quick,
        "sections": list(options.sections),
        "order": [spec.name for spec in order],
        "titles": {spec.name: spec.title for spec in (*COMPARED, AS_SHIPPED)},
        "model": config.model.name,
        "page_bytes": PAGE_BYTES,
        "layer_count": LAYER_COUNT,
        "block_bytes": BLOCK_BYTES,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.transfer_figures", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one block each and few requests")
    parser.add_argument("--sections", type=_names, default=SECTIONS, help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--model", type=Path, default=Path("~/.cache/baton/models/smollm2-135m-instruct"))
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, help="raw records")
    parser.add_argument("--report", type=Path, help="markdown")
    parser.add_argument(
        "--report-from", type=Path, nargs="+", help="run nothing; make the report from these raw records"
    )
    parser.add_argument("--wait-quiet-s", type=float, default=20.0, help="longest wait for others, before each block")
    parser.add_argument("--logs", type=Path, default=Path(".baton/bench"), help="the servers' logs")
    options = parser.parse_args(arguments)
    options.model = options.model.expanduser()
    stem = "transfer-quick" if options.quick else "transfer"
    options.out = options.out or Path(f"docs/evidence/{stem}.jsonl")
    options.report = options.report or Path(f"docs/benchmarks/{stem}.md")
    return options


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SECTIONS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
