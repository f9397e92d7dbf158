"""Thousands of open streams on one router process: ``python -m bench.open_streams --write``.

A real fleet of processes: one router, a prefill worker and decode workers on simulated engines at one token a second,
and a reader of all streams in a process of its own. Streams are opened evenly; then spans of one length are measured,
in pairs, each kind first as often as second, so that drift falls on both:

    all read, a tenth stalled | a tenth stalled, all read | ...

What is compared is the others' p99 gap (ITL), at the readers and at the router's own edge, and how long a token is
inside the router; each with an interval from resampling the pairs and what is in them. Every stream is read to its
end, its tokens counted as they come, and its text compared with what its engine had to say. Then as many streams once
more: what the first ones left behind must be used again.

The engines deal their streams out to micro-batches that take turns. With one batch an engine, all tokens of a second
come in one burst, and a reader's gap tells its place in the burst, not what others cost it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.fleet_under_test import FleetUnderTest, running_fleet
from bench.machine import MachineClock, machine_facts
from bench.open_streams_router import FIELD_COUNT, MEMORY_VARIABLE, RECORDS_VARIABLE
from bench.real_fleet import free_ports
from bench.results.statistics import Drawn, Interval, Percentile, Ratio, Values, draw_pairs, percentile
from bench.soaking import say
from engine.sim_tokens import TokenRule
from fleet.config import FleetConfig, parse_config
from router.tiny_model import END_ID, tiny_tokenizer, write_tiny_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "open-streams.md"
CONTEXT = 2000
VOCABULARY: int = tiny_tokenizer().get_vocab_size()
RULE: dict[str, Any] = {"vocab_size": VOCABULARY, "special_token_count": 3, "eos_token_id": END_ID}
KV_BYTES_PER_TOKEN = 1000
MOST_RUNNING = 4096
"""Of one engine, as its configuration has it."""
WORKER_SILENCE_S = 10.0
"""Of the router, whose default is 1 s: every process of this has to share the machine's few cores with all others."""
MEMORY_FILE = "memory"
ROUTER_MODULE = "bench.open_streams_router"
FULL_TIMEOUT_S = 30.0
"""Until the windows of all that stall are full, and until they have caught up."""
SLICE_S = 0.25
"""What ends within it is resampled together: what queues behind one burst is not independent."""
MOVE_LIMIT = 0.05
KEPT = "kept"
ALL_READ, STALLED = "all read", "a tenth stalled"
STATISTICS = (Percentile(50.0), Percentile(99.0))
P50, P99 = 0, 1
"""Their places."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run. How many tokens each stream has follows: enough for all of it, and then some."""

    stream_count: int
    step_s: float = 0.93
    """What an engine's model takes for a token of each stream. Its process takes some more: about a second in all."""
    span_s: float = 4.0
    settle_s: float = 2.0
    """Between two spans: what changed has changed by then."""
    per_s: float = 150.0
    """Streams opened a second."""
    stalled_share: float = 0.1
    worker_count: int = 4
    micro_batch_count: int = 20
    pair_count: int = 10
    has_second_wave: bool = True
    spare_token_count: int = 30
    """Of each stream, beyond what its time should take: for a machine that takes longer."""

    def __post_init__(self) -> None:
        if self.token_count + 64 > CONTEXT:
            raise SystemExit(
                f"{self.token_count} tokens a stream do not fit its context; make --span-s or the ramp shorter"
            )

    @property
    def ramp_s(self) -> float:
        return self.stream_count / self.per_s

    @property
    def token_count(self) -> int:
        spans_s = 2 * self.pair_count * (self.span_s + 1.25 * self.settle_s)
        return math.ceil((1.1 * self.ramp_s + 1.05 * spans_s) / self.step_s) + self.spare_token_count

    @property
    def second_token_count(self) -> int:
        """Of the second wave, whose streams need only be open all at once."""
        return math.ceil(1.15 * self.ramp_s / self.step_s) + 10

    @property
    def span_names(self) -> list[str]:
        names: list[str] = []
        for number in range(self.pair_count):
            names += (ALL_READ, STALLED) if number % 2 == 0 else (STALLED, ALL_READ)
        return names


@dataclass(frozen=True, slots=True)
class Measured:
    """Of the readers that never stall, in one span: values and the moments (CLOCK_MONOTONIC) at which they ended."""

    ended_at: Values
    seconds: Values

    def units(self) -> list[Values]:
        """In slices of time."""
        if not self.seconds.size:
            return []
        order = np.argsort(self.ended_at, kind="stable")
        slices = np.floor(self.ended_at[order] / SLICE_S)
        return [each for each in np.split(self.seconds[order], np.flatnonzero(np.diff(slices)) + 1) if each.size]


@dataclass(slots=True)
class Span:
    """One measured span."""

    name: str
    began_at: float
    ended_at: float
    gaps: Measured = field(repr=False)
    """Between two messages of a stream, at its reader."""
    full_count: int
    """Stallers whose windows had no room left, at both ends of the span."""
    kept_back_count: int
    """Tokens that stallers have less than others at its end."""
    router_rss_bytes: int
    cpu_s: dict[str, float]
    others_share: float
    """Of the machine, used by processes that are no part of this."""
    write_gaps: Measured | None = None
    """Between two writes of a call that the router began."""
    stays: Measured | None = None
    """From the worker's message in the router's hands to the beginning of the write, each token's."""
    indirect_count: int = 0
    """Writes begun by another task than the one that read the worker's message: their stay is not known."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one thing measured in both kinds of spans."""

    all_read_s: tuple[float, float]
    """p50, p99."""
    stalled_s: tuple[float, float]
    move: Ratio
    """Of p99."""
    moved_s: Interval
    """By how much, seconds."""
    apart: tuple[float, ...]
    """How far the p99 of two spans in a row of the same kind were apart, of the first."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[Measured, Measured]], alike: Sequence[tuple[Measured, Measured]]) -> Comparison:
        """``pairs``: (all read, stalled), as they were run. ``alike``: neighbours of one kind."""
        drawn: Drawn = draw_pairs(
            [(read.units(), stalled.units()) for read, stalled in pairs],  # type: ignore[misc]  # arrays will do
            STATISTICS,
            random.Random(1),  # noqa: S311  # resamples
        )
        return cls(
            (drawn.a[P50], drawn.a[P99]),
            (drawn.b[P50], drawn.b[P99]),
            drawn.ratio(P99),
            drawn.difference(P99),
            tuple(percentile(later.seconds, 99) / percentile(first.seconds, 99) - 1 for first, later in alike),
        )


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the router. What is resident and not in use waits to be used again."""

    rss_bytes: int
    peak_bytes: int
    """The most that was resident until then."""
    malloc_bytes: int
    """In use of glibc's malloc: gRPC's, and Python's larger objects."""
    python_block_count: int
    """In use of Python's own allocator of small objects."""


@dataclass(frozen=True, slots=True)
class Wave:
    """So many streams from the first to be opened to the last to end."""

    begun_count: int
    finished_count: int
    wrong: tuple[str, ...]
    token_count: int
    message_count: int
    at_open: Memory
    """With all of them open."""
    at_end: Memory
    """When all were over."""


@dataclass(frozen=True, slots=True)
class Report:
    plan: Plan
    base: Memory
    """Without streams."""
    waves: tuple[Wave, ...]
    spans: tuple[Span, ...]
    staller_count: int
    gaps: Comparison
    write_gaps: Comparison
    stays: Comparison
    took_s: float

    @property
    def rss_per_stream_bytes(self) -> float:
        return (self.waves[0].at_open.rss_bytes - self.base.rss_bytes) / self.plan.stream_count

    @property
    def has_stalled(self) -> bool:
        """Whether as many readers stalled as were asked to, with full windows, in every span that says so."""
        asked = self.plan.stalled_share * self.plan.stream_count
        return abs(self.staller_count - asked) <= max(0.1 * asked, 1.0) and all(
            span.full_count == self.staller_count and span.kept_back_count > 0
            for span in self.spans
            if span.name == STALLED
        )

    @property
    def is_complete(self) -> bool:
        return all(
            wave.begun_count == wave.finished_count == self.plan.stream_count and not wave.wrong
            for wave in self.waves
        )

    @property
    def itl_verdict(self) -> str:
        if not self.has_stalled:
            return "not decided: readers did not stall as they were asked to"
        return itl_verdict(self.gaps.move)

    @property
    def is_kept(self) -> bool:
        return self.is_complete and self.has_stalled and self.itl_verdict == KEPT


def itl_verdict(move: Ratio) -> str:
    """On the others' ITL, from the whole interval of its p99's ratio."""
    if move.low is None or move.high is None:
        return "not decided: too few pairs for an interval"
    if move.high <= 1 + MOVE_LIMIT:
        return KEPT
    return "MISSED" if move.low > 1 + MOVE_LIMIT else "not decided: the limit is within the interval"


class Part:
    """The readers' process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> Part:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bench.open_streams_readers",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def tell(self, *command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the readers ended while they were told {command[0]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()


class OpenStreams:
    """One run on a ready fleet."""

    def __init__(self, plan: Plan, fleet: FleetUnderTest, readers: Part, folder: Path) -> None:
        self._plan = plan
        self._fleet = fleet
        self._readers = readers
        self._folder = folder
        workers = {worker_id: fleet.pid(worker_id) for worker_id in fleet.endpoints()}
        self._pids = {"router": _pid_of(ROUTER_MODULE), **workers, "readers": readers.pid}
        self._staller_count = 0

    async def run(self, writes_path: Path) -> Report:
        plan, began_at = self._plan, time.monotonic()
        base = await self._memory()
        await self._open(plan.token_count)
        await asyncio.sleep(plan.settle_s)
        at_open = await self._memory()
        spans: list[Span] = []
        is_stalling = False
        for name in plan.span_names:
            if (name == STALLED) != is_stalling:
                is_stalling = name == STALLED
                await (self._stall() if is_stalling else self._go_on())
            await asyncio.sleep(plan.settle_s)
            spans.append(await self._span(name))
        if is_stalling:
            await self._go_on()
        at_end = await self._readers.tell("stats")
        if at_end["finished"]:
            raise RuntimeError(f"{at_end['finished']} streams were over before the last span was: open them faster")
        waves = [await self._finish(plan.token_count, at_open)]
        if plan.has_second_wave:
            await self._open(plan.second_token_count)
            waves.append(await self._finish(plan.second_token_count, await self._memory()))
        add_writes(spans, np.fromfile(writes_path))
        pairs = pairs_of(spans)
        alike = [(first, later) for first, later in itertools.pairwise(spans) if first.name == later.name]
        say("resampling")
        return Report(
            plan,
            base,
            tuple(waves),
            tuple(spans),
            self._staller_count,
            Comparison.of(
                [(read.gaps, stalled.gaps) for read, stalled in pairs],
                [(first.gaps, later.gaps) for first, later in alike],
            ),
            Comparison.of(
                [(_known(read.write_gaps), _known(stalled.write_gaps)) for read, stalled in pairs],
                [(_known(first.write_gaps), _known(later.write_gaps)) for first, later in alike],
            ),
            Comparison.of(
                [(_known(read.stays), _known(stalled.stays)) for read, stalled in pairs],
                [(_known(first.stays), _known(later.stays)) for first, later in alike],
            ),
            time.monotonic() - began_at,
        )

    async def _open(self, token_count: int) -> None:
        plan, began_at = self._plan, time.monotonic()
        say(f"opening {plan.stream_count} streams of {token_count} tokens, {plan.per_s:g} a second")
        told = await self._readers.tell(
            "open",
            self._fleet.address,
            plan.stream_count,
            token_count,
            plan.per_s,
            plan.stalled_share,
            self._timeout_s(token_count),
            RULE,
        )
        say(f"open after {time.monotonic() - began_at:.0f} s: {told}; router {self._router_rss() / 2**20:.0f} MiB")
        if told["wrong_count"]:
            raise RuntimeError(f"{told['wrong_count']} streams failed to begin: {told['wrong']}")
        self._staller_count = told["stallers"]

    async def _finish(self, token_count: int, at_open: Memory) -> Wave:
        say("waiting for every stream's end")
        over = await self._readers.tell("finish", self._timeout_s(token_count))
        await asyncio.sleep(self._plan.settle_s)
        at_end = await self._memory()
        say(f"over: {over}; router {at_end}")
        return Wave(
            over["begun"],
            over["finished"],
            tuple(over["wrong"]),
            over["tokens"],
            over["messages"],
            at_open,
            at_end,
        )

    async def _stall(self) -> None:
        """Returns when nothing can be sent to any of the stallers."""
        await self._readers.tell("stall")
        await self._until("their windows are full", lambda told: told["full"] == told["stallers"])

    async def _go_on(self) -> None:
        """Returns when they have caught up."""
        await self._readers.tell("go_on")
        await self._until("they have caught up", lambda told: _kept_back(told) <= 2 * told["stallers"])

    async def _until(self, what: str, is_so: Any) -> None:
        ends_at = time.monotonic() + FULL_TIMEOUT_S
        while not is_so(told := await self._readers.tell("stats")):
            if time.monotonic() > ends_at:
                raise RuntimeError(f"{FULL_TIMEOUT_S:g} s were not enough until {what}: {told}")
            await asyncio.sleep(0.5)

    async def _span(self, name: str) -> Span:
        before = await self._readers.tell("measure")
        began_at, machine, cpu = time.monotonic(), MachineClock.read(), self._cpu_s()
        await asyncio.sleep(self._plan.span_s)
        ended_at = time.monotonic()
        used = {part: seconds - cpu[part] for part, seconds in self._cpu_s().items()}
        others = MachineClock.read().use_since(machine, sum(used.values())).others_share
        path = self._folder / "gaps"
        after = await self._readers.tell("measured", str(path))
        values = np.fromfile(path)
        gaps = Measured(*np.split(values, 2))
        if not gaps.seconds.size:
            raise RuntimeError(f"no gaps in {name!r}: the spans are too short for the step")
        span = Span(
            name,
            began_at,
            ended_at,
            gaps,
            min(before["full"], after["full"]),
            _kept_back(after),
            self._router_rss(),
            used,
            others,
        )
        p50, p99 = (percentile(gaps.seconds, percent) for percent in (50, 99))
        say(
            f"{name}: {gaps.seconds.size} gaps, p50 {p50:.4f} s, p99 {p99:.4f} s, "
            f"longest {gaps.seconds.max():.3f} s; {span.full_count} stalled; "
            f"router {span.router_rss_bytes / 2**20:.0f} MiB; cpu "
            + ", ".join(f"{part} {seconds / self._plan.span_s:.2f}" for part, seconds in used.items())
            + f"; others {others:.2f}"
        )
        return span

    def _timeout_s(self, token_count: int) -> float:
        return token_count * self._plan.step_s * 2 + 120

    async def _memory(self) -> Memory:
        path = self._folder / MEMORY_FILE
        path.unlink(missing_ok=True)
        os.kill(self._pids["router"], signal.SIGUSR1)
        async with asyncio.timeout(FULL_TIMEOUT_S):
            while not path.exists():  # noqa: ASYNC110  # another process makes it; five times a run
                await asyncio.sleep(0.05)
        pid = self._pids["router"]
        return Memory(rss_bytes(pid), peak_bytes(pid), **json.loads(path.read_text()))

    def _router_rss(self) -> int:
        return rss_bytes(self._pids["router"])

    def _cpu_s(self) -> dict[str, float]:
        return {part: _cpu_s(pid) for part, pid in self._pids.items()}


def pairs_of(spans: Sequence[Span]) -> list[tuple[Span, Span]]:
    """(all read, stalled), whichever came first."""
    pairs = []
    for first, second in zip(spans[::2], spans[1::2], strict=True):
        pairs.append((first, second) if first.name == ALL_READ else (second, first))
    return pairs


def add_writes(spans: Sequence[Span], records: Values) -> None:
    """Deals what the router noted out to the spans. See ``bench.open_streams_router``."""
    rows = records[: records.size // FIELD_COUNT * FIELD_COUNT].reshape(-1, FIELD_COUNT)
    for span in spans:
        first, last = np.searchsorted(rows[:, 0], (span.began_at, span.ended_at))
        at, stays, gaps = rows[first:last].T
        is_known = stays >= 0
        span.write_gaps = Measured(at, gaps)
        span.stays = Measured(at[is_known], stays[is_known])
        span.indirect_count = int((~is_known).sum())


def _known(measured: Measured | None) -> Measured:
    assert measured is not None, "what the router noted was dealt out"
    return measured


def _kept_back(told: dict[str, Any]) -> int:
    """Tokens that stallers have less than as many of the others."""
    others = told["streams"] - told["stallers"]
    expected = (told["tokens"] - told["stalled_tokens"]) / max(1, others) * told["stallers"]
    behind: int = round(expected) - int(told["stalled_tokens"])
    return behind


def _pid_of(module: str) -> int:
    """Our own descendant that runs it."""
    parents: dict[int, int] = {}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            stat = (entry / "stat").read_text()
        except OSError:  # gone meanwhile
            continue
        parents[int(entry.name)] = int(stat[stat.rindex(")") + 2 :].split()[1])
        if module.encode() in words:
            found.append(int(entry.name))
    for pid in found:
        above: int = pid
        while above > 1:
            if above == os.getpid():
                return pid
            above = parents.get(above, 0)
    raise RuntimeError(f"no process of ours runs {module}")


def rss_bytes(pid: int) -> int:
    return _status_bytes(pid, "VmRSS")


def peak_bytes(pid: int) -> int:
    return _status_bytes(pid, "VmHWM")


def _status_bytes(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} is gone")


def _cpu_s(pid: int) -> float:
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text[text.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def fleet_config(plan: Plan, folder: Path) -> FleetConfig:
    model = write_tiny_model(folder / "model", max_context_token_count=CONTEXT)
    listen, admin, metrics = free_ports(3)
    per_worker = math.ceil(1.5 * plan.stream_count / plan.worker_count)
    if per_worker > MOST_RUNNING:
        raise SystemExit(f"{plan.stream_count} streams want more than {plan.worker_count} workers")
    decode_s = plan.step_s / plan.micro_batch_count
    tokens = ", ".join(f"{key} = {value}" for key, value in RULE.items())

    def pool(role: str, count: int, running: int, micro_batches: int) -> str:
        kv = max(CONTEXT, running * (plan.token_count + 64)) * KV_BYTES_PER_TOKEN
        return f"""
            [{role}]
            count = {count}
            cores = {[[0] for _ in range(count)]}
            [{role}.engine]
            kind = "simulated"
            block_token_count = 16
            max_context_token_count = {CONTEXT}
            max_running_count = {running}
            max_batched_token_count = {max(4096, running)}
            kv_cache_bytes = {kv}
            enable_prefix_caching = false
            lease_s = 600.0
            [{role}.simulated]
            max_waiting_count = {running}
            micro_batch_count = {micro_batches}
            tokens = {{{tokens}}}
            [{role}.simulated.cost]
            kv_bytes_per_token = {KV_BYTES_PER_TOKEN}
            prefill = {{base_s = 0.001, per_token_s = 0.0, per_token_squared_s = 0.0}}
            decode = {{base_s = {decode_s}, per_context_token_s = 0.0, per_sequence_s = 0.0}}
        """

    return parse_config(f"""
        [cluster]
        runner = "local"
        state_dir = "{folder / "state"}"
        [model]
        name = "tiny"
        path = "{model}"
        [router]
        listen_address = "127.0.0.1:{listen}"
        admin_address = "127.0.0.1:{admin}"
        metrics_address = "127.0.0.1:{metrics}"
        placement = "split"
        lease_s = 600.0
        log_level = "WARNING"
        worker_silence_s = {WORKER_SILENCE_S}
        max_concurrent_call_count = {plan.stream_count + 100}
        max_in_flight_count = {plan.stream_count + 100}
        queue_limit = {plan.stream_count}
        {pool("prefill", 1, 256, 1)}
        {pool("decode", plan.worker_count, per_worker, plan.micro_batch_count)}
    """)


def raise_file_limit(wanted: int) -> None:
    """Sockets are few (hundreds of streams share one), yet a limit of 1,024 is soon met."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < ceiling:
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))


async def run(plan: Plan) -> Report:
    assert TokenRule(**RULE).never_ends
    raise_file_limit(8192)
    with tempfile.TemporaryDirectory(prefix="baton-open-streams-") as temporary:
        folder = Path(temporary)
        writes_path = folder / "writes"
        config = fleet_config(plan, folder)
        env = {RECORDS_VARIABLE: str(writes_path), MEMORY_VARIABLE: str(folder / MEMORY_FILE)}
        async with running_fleet(config, start_timeout_s=90.0, router_module=ROUTER_MODULE, router_env=env) as fleet:
            readers = await Part.start()
            try:
                return await OpenStreams(plan, fleet, readers, folder).run(writes_path)
            finally:
                await readers.stop()


def page_of(report: Report) -> str:
    plan, facts, first = report.plan, machine_facts(), report.waves[0]
    finished = " and ".join(str(wave.finished_count) for wave in report.waves)
    wrong = [each for wave in report.waves for each in wave.wrong]
    indirect, writes = (
        sum(span.indirect_count for span in report.spans),
        sum(_known(span.write_gaps).seconds.size for span in report.spans),
    )
    full = min((span.full_count for span in report.spans if span.name == STALLED), default=0)
    kept_back = min((span.kept_back_count for span in report.spans if span.name == STALLED), default=0)
    lines = [
        "# Open streams",
        "",
        f"{facts['at']}; {facts['cpu_model']}, {facts['core_count']} cores, {facts['memory_gib']} GiB; Python "
        f"{facts['python']}, grpcio {facts['packages']['grpcio']}; commit {facts['commit']}.",
        "",
        f"`python -m bench.open_streams --streams {plan.stream_count}`: one router process, one prefill and "
        f"{plan.worker_count} decode workers on simulated engines, one process that reads, all on these cores. An "
        f"engine's model takes {plan.step_s:g} s for a token of each stream, its process some more: one comes every "
        f"{report.gaps.all_read_s[P50]:.2f} s (p50). The streams of an engine are in "
        f"{plan.micro_batch_count} micro-batches that take turns; {plan.per_s:g} streams opened a second; "
        f"{plan.token_count} tokens a stream; "
        f"{plan.pair_count} pairs of spans of {plan.span_s:g} s, one with all reading, one with a tenth stalled, "
        f"each kind first in every other pair. {_priority()}",
        "",
        "Micro-batches, since with one batch an engine (`--micro-batches 1`) all tokens of a second come at once: a "
        "reader's gap then tells its place in the burst, which changes with whatever else runs on these cores.",
        "",
        f"- streams opened {plan.stream_count}"
        + (", and as many again when those were over" if len(report.waves) > 1 else "")
        + f"; finished and right to the last token {finished}; wrong: {', '.join(wrong) or 'none'}. Nothing dropped: "
        + (KEPT if report.is_complete else "BROKEN"),
        f"- {report.staller_count} readers stall: they give the router no room, and in every such span, at its "
        f"beginning and at its end, {full} of them had flow-control windows without room for another byte; "
        f"they had at least {kept_back} tokens less than as many others",
        f"- p99 between two messages, of the readers that never stall: **{_move(report.gaps.move)}** while those "
        f"stalled. Goal: at most {100 * MOVE_LIMIT:+.0f} %: **{report.itl_verdict}**",
        f"- memory of the router: {_mib(report.base)} without streams, {_mib(first.at_open)} with all of them open: "
        f"**{report.rss_per_stream_bytes / 1024:.1f} KiB a stream**; {_mib(first.at_end)} when all were over",
        *(
            f"- as many streams once more: {_mib(wave.at_open)} with all of them open, {_mib(wave.at_end)} when all "
            f"were over; the most that ever was resident rose by "
            f"{(wave.at_end.peak_bytes - first.at_end.peak_bytes) / 2**20:.0f} MiB. What is resident when all are "
            "over and not in use (below) is Python's and malloc's, kept to be used again"
            for wave in report.waves[1:]
        ),
        f"- tokens a message: {first.token_count / max(1, first.message_count):.3f}; the run took "
        f"{report.took_s:.0f} s",
        "",
        "Of the readers that never stall, over all spans of a kind; the 95 % intervals of p99's move come from "
        "resampling pairs and slices of time within them:",
        "",
        "| ms | all read: p50 | p99 | a tenth stalled: p50 | p99 | p99 moves by | p99 moves by, ms "
        "| two alike in a row are apart |",
        "| --- |" + " --- |" * 7,
        *(
            f"| {name} | {_ms(each.all_read_s)} | {_ms(each.stalled_s)} | {_move(each.move)} | {_moved(each)} | "
            f"{100 * statistics.median(map(abs, each.apart)) if each.apart else math.nan:.1f} % |"
            for name, each in (
                ("between two messages, at the reader", report.gaps),
                ("between two writes begun, at the router's edge", report.write_gaps),
                ("a token inside the router: from the worker's message to the write's beginning", report.stays),
            )
        ),
        "",
        f"Of {writes} writes, {indirect} were begun by another task than the one that had read the worker's message, "
        "and are in the first two rows only.",
        "",
        "| memory of the router | resident, MiB | most until then | in use of malloc, MiB | in use of Python's small "
        "blocks |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {when} | {each.rss_bytes / 2**20:.1f} | {each.peak_bytes / 2**20:.1f} | "
            f"{each.malloc_bytes / 2**20:.1f} | {each.python_block_count} |"
            for when, each in _memories(report)
        ),
        "",
        "| span | gaps | p50, s | p99, s | longest, s | in the router: p99, ms | windows full | router, MiB "
        "| CPU of router | workers | reader | others on the machine |",
        "| --- |" + " --- |" * 11,
    ]
    for span in report.spans:
        per_s = {part: seconds / plan.span_s for part, seconds in span.cpu_s.items()}
        workers = sum(share for part, share in per_s.items() if part.startswith(("prefill", "decode")))
        seconds = span.gaps.seconds
        lines.append(
            f"| {span.name} | {seconds.size} | {percentile(seconds, 50):.4f} | {percentile(seconds, 99):.4f} | "
            f"{seconds.max():.3f} | {1000 * percentile(_known(span.stays).seconds, 99):.1f} | {span.full_count} | "
            f"{span.router_rss_bytes / 2**20:.0f} | {per_s['router']:.2f} | {workers:.2f} | "
            f"{per_s['readers']:.2f} | {span.others_share:.2f} |"
        )
    return "\n".join([*lines, ""])


def _memories(report: Report) -> Iterator[tuple[str, Memory]]:
    yield "without streams", report.base
    for number, wave in enumerate(report.waves, start=1):
        yield f"all open, wave {number}", wave.at_open
        yield f"all over, wave {number}", wave.at_end


def _priority() -> str:
    policy = os.sched_getscheduler(0)
    if policy in (os.SCHED_RR, os.SCHED_FIFO):
        return "All of it ran at real-time priority, for the machine was shared with other work."
    return "All of it ran at usual priority."


def _mib(memory: Memory) -> str:
    return f"{memory.rss_bytes / 2**20:.0f} MiB"


def _ms(seconds: Sequence[float]) -> str:
    return " | ".join(f"{1000 * each:.2f}" for each in seconds)


def _moved(each: Comparison) -> str:
    value = each.stalled_s[P99] - each.all_read_s[P99]
    low, high = (math.nan if bound is None else 1000 * bound for bound in (each.moved_s.low, each.moved_s.high))
    return f"{1000 * value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _move(move: Ratio) -> str:
    value, low, high = (math.nan if each is None else 100 * (each - 1) for each in (move.value, move.low, move.high))
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"


def plan_of(words: Sequence[str] | None = None) -> tuple[Plan, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m bench.open_streams", description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--step-s", type=float, default=0.93, help="an engine's model for a token of each stream")
    parser.add_argument("--span-s", type=float, default=4.0, help="length of each measured span")
    parser.add_argument("--settle-s", type=float, default=2.0, help="between two spans")
    parser.add_argument("--pairs", type=int, default=10, help="of spans")
    parser.add_argument("--per-s", type=float, default=150.0, help="streams opened a second")
    parser.add_argument("--stalled-share", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=4, help="decode workers")
    parser.add_argument("--micro-batches", type=int, default=20, help="of an engine; 1: all tokens come at once")
    parser.add_argument("--one-wave", action="store_true", help="no second wave of streams")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args(words)
    plan = Plan(
        stream_count=options.streams,
        step_s=options.step_s,
        span_s=options.span_s,
        settle_s=options.settle_s,
        per_s=options.per_s,
        stalled_share=options.stalled_share,
        worker_count=options.workers,
        micro_batch_count=options.micro_batches,
        pair_count=options.pairs,
        has_second_wave=not options.one_wave,
    )
    return plan, options


def main() -> int:
    plan, options = plan_of()
    report = asyncio.run(run(plan))
    page = page_of(report)
    say(page)
    if options.write:
        PAGE.write_text(page)
    if report.is_complete and report.itl_verdict.startswith("not decided"):
        return 2
    return 0 if report.is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
