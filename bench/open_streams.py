"""Thousands of open streams on one router process: ``python -m bench.open_streams --streams 10000 --write``.

A real fleet of processes: one router, a prefill worker and decode workers on simulated engines at one token a second,
and clients in processes of their own. Streams are opened evenly, then spans of one length are measured, in turns:

    all read | all read again: what two spans differ by anyway | a tenth does not read | all read ...

Every stream is read to its end, its tokens counted as they come, and its text compared with what its engine had to
say.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.fleet_under_test import FleetUnderTest, running_fleet
from bench.machine import MachineClock, machine_facts
from bench.real_fleet import free_ports
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
SETTLE_S = 5.0
"""Between two spans: what changed has changed by then."""
MOVE_LIMIT = 0.05
KEPT = "kept"
SPANS = ("all read", "all read, again", "some stalled")
"""Of one turn."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. ``token_count`` of each stream follows: enough for all of it, and then some."""

    stream_count: int
    step_s: float
    span_s: float
    per_s: float
    """Streams opened a second."""
    stalled_share: float
    worker_count: int
    client_count: int
    turn_count: int = 3

    @property
    def token_count(self) -> int:
        ramp_s = self.stream_count / self.per_s
        spans_s = (self.turn_count * len(SPANS) + 1) * (self.span_s + min(SETTLE_S, self.span_s))
        count = math.ceil((1.3 * ramp_s + 1.15 * spans_s) / self.step_s) + 20
        if count + 64 > CONTEXT:
            raise SystemExit(f"{count} tokens a stream do not fit its context; make --span-s or the ramp shorter")
        return count


@dataclass(frozen=True, slots=True)
class Span:
    """One measured span of the readers that never stall."""

    name: str
    gap_count: int
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float
    router_rss_bytes: int
    cpu_s: dict[str, float]
    others_share: float
    """Of the machine, used by processes that are no part of this."""


@dataclass(frozen=True, slots=True)
class Report:
    plan: Plan
    spans: tuple[Span, ...]
    base_rss_bytes: int
    open_rss_bytes: int
    """With every stream open, before the first span."""
    end_rss_bytes: int
    """When all were over."""
    begun_count: int
    finished_count: int
    wrong: tuple[str, ...]
    tokens_per_message: float
    staller_count: int
    kept_back_count: int
    """Tokens that stalled readers had not taken at the end of their span, and the others had: the least of all
    turns."""
    took_s: float

    @property
    def rss_per_stream_bytes(self) -> float:
        return (self.open_rss_bytes - self.base_rss_bytes) / self.plan.stream_count

    @property
    def moves(self) -> list[float]:
        """Of the others' p99 while some stalled, against the two spans before it, turn by turn."""
        return [stalled.p99_s / ((first.p99_s + again.p99_s) / 2) - 1 for first, again, stalled in self._turns()]

    @property
    def noises(self) -> list[float]:
        """The same between two spans that differ in nothing."""
        return [again.p99_s / first.p99_s - 1 for first, again, _ in self._turns()]

    @property
    def move(self) -> float:
        """The middle one."""
        return statistics.median(self.moves)

    @property
    def has_stalled(self) -> bool:
        """Whether as many readers stalled as were asked to (each client rounds down), and lagged in every turn."""
        asked = self.plan.stalled_share * self.plan.stream_count
        near = max(0.1 * asked, self.plan.client_count)
        return abs(self.staller_count - asked) <= near and (not asked or self.kept_back_count > 0)

    def _turns(self) -> Iterator[tuple[Span, Span, Span]]:
        for start in range(0, len(self.spans), len(SPANS)):
            first, again, stalled = self.spans[start : start + len(SPANS)]
            yield first, again, stalled

    @property
    def is_complete(self) -> bool:
        return self.begun_count == self.finished_count == self.plan.stream_count and not self.wrong

    @property
    def itl_verdict(self) -> str:
        if not self.has_stalled:
            return "not decided: readers did not stall as they were asked to"
        return itl_verdict(self.moves, self.noises)

    @property
    def is_kept(self) -> bool:
        return self.is_complete and self.has_stalled and self.itl_verdict == KEPT


def itl_verdict(moves: Sequence[float], noises: Sequence[float]) -> str:
    """On the others' ITL. ``noises``: moves between spans that differ in nothing. A machine that moves by more than
    the limit by itself can neither keep nor miss it, unless the move exceeds its noise by the limit, too."""
    move, noise = statistics.median(moves), statistics.median(abs(each) for each in noises)
    if noise <= MOVE_LIMIT:
        return KEPT if move <= MOVE_LIMIT else "MISSED"
    if move > noise + MOVE_LIMIT:
        return "MISSED"
    return f"not decided: the machine's own noise is {100 * noise:.0f} %"


class Part:
    """A client process."""

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
            raise RuntimeError(f"a client ended while it was told {command[0]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()


class OpenStreams:
    """One run on a ready fleet."""

    def __init__(self, plan: Plan, fleet: FleetUnderTest, clients: Sequence[Part], folder: Path) -> None:
        self._plan = plan
        self._fleet = fleet
        self._clients = clients
        self._folder = folder
        workers = {worker_id: fleet.pid(worker_id) for worker_id in fleet.endpoints()}
        self._pids = {"router": _pid_of("fleet.router_process"), **workers}
        for number, client in enumerate(clients):
            self._pids[f"clients {number}"] = client.pid

    async def run(self) -> Report:
        plan, began_at = self._plan, time.monotonic()
        base_rss = rss_bytes(self._pids["router"])
        share, rest = divmod(plan.stream_count, len(self._clients))
        timeout_s = plan.token_count * plan.step_s * 2 + 120
        say(f"opening {plan.stream_count} streams of {plan.token_count} tokens, {plan.per_s:g} a second")
        opening = [
            client.tell(
                "open",
                self._fleet.address,
                share + (number < rest),
                plan.token_count,
                plan.per_s / len(self._clients),
                plan.stalled_share,
                timeout_s,
                RULE,
            )
            for number, client in enumerate(self._clients)
        ]
        told = _sum(await asyncio.gather(*opening))
        say(f"open after {time.monotonic() - began_at:.0f} s: {told}")
        if told["wrong_count"]:
            raise RuntimeError(f"{told['wrong_count']} streams failed to begin: {told['wrong']}")
        await self._settle()
        open_rss = rss_bytes(self._pids["router"])
        spans = []
        kept_back: list[int] = []
        for number, name in enumerate(SPANS * plan.turn_count):
            if name == "some stalled":
                before = await self._tell("stall")
                await self._settle()
            spans.append(await self._span(name, number))
            if name == "some stalled":
                after = await self._tell("go_on")
                kept_back.append(_kept_back(before, after))
                await self._settle()
        await self._settle()
        at_end = await self._tell("stats")
        if at_end["finished"]:
            raise RuntimeError(f"{at_end['finished']} streams were over before the last span was: open them faster")
        say("waiting for every stream's end")
        over = _sum(await asyncio.gather(*(client.tell("finish", timeout_s) for client in self._clients)))
        say(f"over: {over}")
        return Report(
            plan,
            tuple(spans),
            base_rss,
            open_rss,
            rss_bytes(self._pids["router"]),
            over["begun"],
            over["finished"],
            tuple(over["wrong"]),
            over["tokens"] / max(1, over["messages"]),
            over["stallers"],
            min(kept_back),
            time.monotonic() - began_at,
        )

    async def _settle(self) -> None:
        await asyncio.sleep(min(SETTLE_S, self._plan.span_s))

    async def _tell(self, *command: Any) -> dict[str, Any]:
        return _sum(await asyncio.gather(*(client.tell(*command) for client in self._clients)))

    async def _span(self, name: str, number: int) -> Span:
        await self._tell("phase", f"span {number}")
        machine, cpu = MachineClock.read(), self._cpu_s()
        await asyncio.sleep(self._plan.span_s)
        used = {part: seconds - cpu[part] for part, seconds in self._cpu_s().items()}
        others = MachineClock.read().use_since(machine, sum(used.values())).others_share
        await self._tell("phase", "")
        rss = rss_bytes(self._pids["router"])
        gaps = array("f")
        for client_number, client in enumerate(self._clients):
            path = self._folder / f"gaps-{client_number}"
            await client.tell("gaps", f"span {number}", str(path))
            with path.open("rb") as file:
                gaps.frombytes(file.read())
        ranked = sorted(gaps)
        if not ranked:
            raise RuntimeError(f"no gaps in {name!r}: the spans are too short for the step")
        p50, p90, p99 = (ranked[min(len(ranked) - 1, int(share * len(ranked)))] for share in (0.5, 0.9, 0.99))
        span = Span(name, len(ranked), p50, p90, p99, ranked[-1], rss, used, others)
        say(
            f"{name}: {span.gap_count} gaps, p50 {p50:.4f} s, p99 {p99:.4f} s, longest {span.max_s:.3f} s; "
            f"router {rss / 2**20:.0f} MiB; cpu "
            + ", ".join(f"{part} {seconds / self._plan.span_s:.2f}" for part, seconds in used.items())
            + f"; others {others:.2f}"
        )
        return span

    def _cpu_s(self) -> dict[str, float]:
        return {part: _cpu_s(pid) for part, pid in self._pids.items()}


def _kept_back(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Tokens that stallers lag behind, had they gone on at the pace of the others."""
    others = after["streams"] - after["stallers"]
    others_gained = (after["tokens"] - after["stalled_tokens"]) - (before["tokens"] - before["stalled_tokens"])
    stallers_gained = after["stalled_tokens"] - before["stalled_tokens"]
    expected: float = others_gained / max(1, others) * after["stallers"]
    return round(expected) - int(stallers_gained)


def _sum(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = told[0]
    return {
        name: [each for one in told for each in one[name]][:5] if name == "wrong" else sum(one[name] for one in told)
        for name in names
    }


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
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
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
    tokens = ", ".join(f"{key} = {value}" for key, value in RULE.items())

    def pool(role: str, count: int, running: int) -> str:
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
            tokens = {{{tokens}}}
            [{role}.simulated.cost]
            kv_bytes_per_token = {KV_BYTES_PER_TOKEN}
            prefill = {{base_s = 0.001, per_token_s = 0.0, per_token_squared_s = 0.0}}
            decode = {{base_s = {plan.step_s}, per_context_token_s = 0.0, per_sequence_s = 0.0}}
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
        {pool("prefill", 1, 256)}
        {pool("decode", plan.worker_count, per_worker)}
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
        async with running_fleet(fleet_config(plan, folder), start_timeout_s=90.0) as fleet:
            clients = [await Part.start() for _ in range(plan.client_count)]
            try:
                return await OpenStreams(plan, fleet, clients, folder).run()
            finally:
                for client in clients:
                    await client.stop()


def page_of(report: Report) -> str:
    plan, facts = report.plan, machine_facts()
    lines = [
        "# Open streams",
        "",
        f"{facts['at']}; {facts['cpu_model']}, {facts['core_count']} cores, {facts['memory_gib']} GiB; Python "
        f"{facts['python']}, grpcio {facts['packages']['grpcio']}; commit {facts['commit']}.",
        "",
        f"`python -m bench.open_streams --streams {plan.stream_count}`: one router process, one prefill and "
        f"{plan.worker_count} decode workers on simulated engines, {plan.client_count} client processes, all on "
        f"these cores. One token every {plan.step_s:g} s and stream; {plan.per_s:g} streams opened a second; "
        f"{plan.token_count} tokens a stream; spans of {plan.span_s:g} s.",
        "",
        f"- streams opened {plan.stream_count}, begun {report.begun_count}, finished and right to the last token "
        f"{report.finished_count}; wrong: {', '.join(report.wrong) or 'none'}. Nothing dropped: "
        + (KEPT if report.is_complete else "BROKEN"),
        f"- memory of the router: {report.base_rss_bytes / 2**20:.0f} MiB without streams, "
        f"{report.open_rss_bytes / 2**20:.0f} MiB with all of them open: "
        f"**{report.rss_per_stream_bytes / 1024:.1f} KiB a stream**; {report.end_rss_bytes / 2**20:.0f} MiB "
        "when all were over",
        f"- {report.staller_count} readers stopped reading in every third span; "
        f"they had at least {report.kept_back_count} tokens less than the others at its end",
        f"- p99 between two messages, of the readers that never stop: **{100 * report.move:+.1f} %** while those "
        f"stalled, against the two spans before, the middle of {_percents(report.moves)}; two spans that differ in "
        f"nothing are {_percents(report.noises)} apart. Goal: at most {100 * MOVE_LIMIT:+.0f} %: "
        + report.itl_verdict,
        f"- tokens a message: {report.tokens_per_message:.2f}; the run took {report.took_s:.0f} s",
        "",
        "| span | gaps | p50, s | p90, s | p99, s | longest, s | router, MiB | CPU of router | workers | clients "
        "| others on the machine |",
        "| --- |" + " --- |" * 10,
    ]
    for span in report.spans:
        per_s = {part: seconds / plan.span_s for part, seconds in span.cpu_s.items()}
        workers = sum(share for part, share in per_s.items() if part.startswith(("prefill", "decode")))
        clients = sum(share for part, share in per_s.items() if part.startswith("clients"))
        lines.append(
            f"| {span.name} | {span.gap_count} | {span.p50_s:.4f} | {span.p90_s:.4f} | {span.p99_s:.4f} | "
            f"{span.max_s:.3f} | {span.router_rss_bytes / 2**20:.0f} | {per_s['router']:.2f} | {workers:.2f} | "
            f"{clients:.2f} | {span.others_share:.2f} |"
        )
    return "\n".join([*lines, ""])


def _percents(shares: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:+.1f}" for share in shares) + " %"


def plan_of(words: Sequence[str] | None = None) -> tuple[Plan, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m bench.open_streams", description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--step-s", type=float, default=1.0, help="between two tokens of a stream")
    parser.add_argument("--span-s", type=float, default=15.0, help="length of each measured span")
    parser.add_argument("--turns", type=int, default=3, help="of three spans each")
    parser.add_argument("--per-s", type=float, default=150.0, help="streams opened a second")
    parser.add_argument("--stalled-share", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=4, help="decode workers")
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args(words)
    plan = Plan(
        options.streams,
        options.step_s,
        options.span_s,
        options.per_s,
        options.stalled_share,
        options.workers,
        options.clients,
        options.turns,
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
