"""Whether our load generator says what others say: ours, ``vllm bench serve`` and aiperf, one after the other, on the
same servers with the same load.

    python -m bench.agreement            # about five minutes; writes docs/benchmarks/agreement.md
    python -m bench.agreement --quick    # under two; prints only

Two servers. The golden one notes what it really did, so it is known which tool is off, and by how much. The other is
vLLM with the default model on one core: there a tool is judged by the others, in mirrored turns, and the machine's
own drift between turns is in every difference.

The tools run on one core and the server on another. All get the same arrival times and the same numbers of tokens;
prompts are token ids, so that no tokenizer is measured. Exit status: 0 when every tool completed every request, 1
otherwise; a difference beyond the goal is a figure and no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baton.request import Role
from bench.agreement_page import page
from bench.agreement_tools import (
    TOOLS,
    Figures,
    Load,
    command_of,
    environment_of,
    figures_of,
    poisson_times,
    truth_of,
)
from bench.children import Child, ChildError
from bench.comparison.environments import pinned_versions, prepared
from bench.comparison.readiness import free_port, is_healthy, until_ready
from bench.comparison.specs import SystemSpec
from bench.comparison.vllm_servers import start_vllm_server
from bench.generator.golden import GoldenScript
from bench.generator.golden_server import golden_process
from bench.machine import MachineClock, machine_facts
from fleet.config import FleetConfig, check_model_directory, load_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/benchmarks/agreement.md"
RAW = ROOT / "docs/evidence/agreement.json"
TOOL_LIMIT_S = 90.0
"""Beyond the load's own length: their starts, and their tables."""
GOLDEN_TTFT_S, GOLDEN_GAP_S = 0.1, 0.02
GOLDEN_GAP_PATTERN = (1.0, 0.5, 1.25, 0.75, 1.0, 1.5, 0.6, 1.0, 1.4, 3.0)
"""Alike for all requests, so that no tool meets another distribution than the next."""
GOLDEN, REAL = "golden", "vllm"


@dataclass(frozen=True, slots=True)
class Volume:
    """Of one server: requests/s, seconds, tokens in and out, and how often each tool has its turn."""

    rate_per_s: float
    duration_s: float
    prompt_token_count: int
    output_token_count: int
    round_count: int


FULL = {GOLDEN: Volume(10.0, 20.0, 64, 40, 1), REAL: Volume(1.5, 20.0, 128, 32, 2)}
QUICK = {GOLDEN: Volume(10.0, 6.0, 64, 40, 1), REAL: Volume(1.5, 6.0, 128, 16, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a terminated benchmark must still end its servers
    began_at = time.monotonic()
    config = load_config(options.config)
    check_model_directory(config)
    model_path = str(Path(config.engines[Role.DECODE].model_path).expanduser())
    aiperf = prepared("peer-aiperf").path / "bin/aiperf"
    volumes = QUICK if options.quick else FULL
    servers: dict[str, Any] = {}
    is_complete = True
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for server in options.servers:
            volume = volumes[server]
            times = poisson_times(volume.rate_per_s, volume.duration_s, options.seed)
            start = _golden if server == GOLDEN else _real
            with start(config, options.cores[1], scratch) as (url, model, truth):
                load = Load(
                    url=url,
                    model=model,
                    tokenizer=model_path,
                    times_s=times,
                    prompt_token_count=volume.prompt_token_count,
                    output_token_count=volume.output_token_count,
                    seed=options.seed,
                )
                turns = _turns(server, load, volume.round_count, options.cores[0], scratch, aiperf, truth)
            is_complete &= all(turn["figures"]["completed"] == len(times) for turn in turns)
            servers[server] = {
                "load": {
                    "rate_per_s": volume.rate_per_s,
                    "duration_s": volume.duration_s,
                    "request_count": len(times),
                    "prompt_token_count": volume.prompt_token_count,
                    "output_token_count": volume.output_token_count,
                    "seed": options.seed,
                },
                "turns": turns,
                "figures": {tool: _mean([t["figures"] for t in turns if t["tool"] == tool]) for tool in TOOLS},
                "truth": {
                    tool: _mean([t["truth"] for t in turns if t["tool"] == tool and t["truth"]]) for tool in TOOLS
                },
            }
    versions = pinned_versions("peer-aiperf")
    raw = {
        "machine": machine_facts(),
        "versions": {"aiperf": versions["aiperf"]},
        "took_s": round(time.monotonic() - began_at, 1),
        "servers": servers,
    }
    text = page(raw)
    if options.quick:
        print(text)
    else:
        options.raw.write_text(json.dumps(raw, indent=1) + "\n")
        options.page.write_text(text)
        print(options.page)
    return 0 if is_complete else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    usable = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description="Our load generator beside two others, on the same load.")
    parser.add_argument("--quick", action="store_true", help="smaller, writes nothing")
    parser.add_argument("--servers", nargs="+", choices=(GOLDEN, REAL), default=(GOLDEN, REAL))
    parser.add_argument("--config", type=Path, default=ROOT / "deploy/baton.toml")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cores", type=int, nargs=2, metavar=("TOOL", "SERVER"), default=(usable[0], usable[-1]))
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--raw", type=Path, default=RAW)
    return parser.parse_args(arguments)


Started = tuple[str, str, Callable[[], Figures | None]]
"""URL, model, and what tells the truth of the turn that just ended, if anything does."""


@contextmanager
def _golden(config: FleetConfig, core: int, scratch: Path) -> Iterator[Started]:
    script = GoldenScript(ttft_s=GOLDEN_TTFT_S, gap_s=GOLDEN_GAP_S, gap_pattern=GOLDEN_GAP_PATTERN)
    with golden_process(script, cores=[core]) as server:
        yield server.url, "golden", lambda: truth_of(server.drain())


@contextmanager
def _real(config: FleetConfig, core: int, scratch: Path) -> Iterator[Started]:
    """One vLLM server on one core. No prefix cache: every turn must find the same server."""
    engine = replace(config.engines[Role.DECODE], enable_prefix_caching=False)
    spec = SystemSpec("agreement", "engine", "one vLLM server, one core")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    child = start_vllm_server(spec, engine, port, (core,), scratch / "vllm-server.log")
    try:
        until_ready(child, lambda: is_healthy(url))
        _warm(url, engine.model_name)
        yield url, engine.model_name, lambda: None
    finally:
        child.stop()


def _warm(url: str, model: str) -> None:
    """The first requests of a server are slower, and would be the first tool's."""
    for _ in range(3):
        body = {"model": model, "prompt": list(range(1000, 1128)), "max_tokens": 16, "ignore_eos": True}
        request = urllib.request.Request(  # noqa: S310  # our own loopback URL
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60.0) as reply:
            reply.read()


def _turns(
    server: str,
    load: Load,
    round_count: int,
    core: int,
    scratch: Path,
    aiperf: Path,
    truth: Callable[[], Figures | None],
) -> list[dict[str, Any]]:
    """ABC, CBA, ...: drift of the machine hits all alike."""
    turns: list[dict[str, Any]] = []
    for round_index in range(round_count):
        for tool in TOOLS if round_index % 2 == 0 else tuple(reversed(TOOLS)):
            directory = scratch / f"{server}-{round_index}-{tool}"
            directory.mkdir()
            # Other prompts in every round, or a cache somewhere might know them.
            this = replace(load, seed=load.seed + 1000 * round_index)
            before = MachineClock.read()
            _run(tool, this, directory, core, aiperf)
            use = MachineClock.read().use_since(before, 0.0)
            turn = {
                "tool": tool,
                "round": round_index,
                "figures": figures_of(tool, directory),
                "truth": truth(),
                "steal_share": round(use.steal_share, 4),
            }
            turns.append(turn)
            ttft_ms, itl_ms = turn["figures"]["ttft_mean"], turn["figures"]["itl_mean"]  # type: ignore[index]
            print(f"{server} {tool}: mean TTFT {ttft_ms:.2f} ms, mean ITL {itl_ms:.3f} ms", flush=True)
    return turns


def _run(tool: str, load: Load, directory: Path, core: int, aiperf: Path) -> None:
    """Raises ``ChildError`` with the end of the tool's own output."""
    child = Child(
        tool,
        command_of(tool, load, directory, aiperf),
        environment=environment_of(tool),
        log_path=directory / "tool.log",
        cores=(core,),
    )
    try:
        deadline = time.monotonic() + load.times_s[-1] + TOOL_LIMIT_S
        while child.is_running():
            if time.monotonic() > deadline:
                raise child.failed("did not end in time")
            time.sleep(0.2)
        try:
            figures_of(tool, directory)
        except (OSError, KeyError, ValueError) as error:
            raise child.failed(f"left no figures ({type(error).__name__})") from None
    finally:
        child.stop()


def _mean(each: Sequence[Figures]) -> Figures:
    return {name: statistics.fmean(figures[name] for figures in each) for name in each[0]} if each else {}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ChildError as error:
        sys.exit(f"bench.agreement: {error}")
