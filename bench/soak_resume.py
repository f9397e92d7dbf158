"""Soak section ``resume``: two routers over simulated engines; sockets are cut, routers restarted, callers leave.

Every answer is compared with the same request's, asked once and never cut: token ids, text, reason and count. A gap
or a repeat fails where it is heard (``resuming_caller.py``).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import signal
import socket
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from baton.client import BatonClient
from baton.errors import Reason
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc
from bench import evidence
from bench.fleet_under_test import FleetUnderTest, running_fleet
from bench.real_fleet import free_ports
from bench.resuming_caller import Heard, ResumingCaller, channel_to
from bench.soaking import SEED, model_directory, say
from bench.tcp_cutter import TcpCutter, tcp_cutter
from fleet.config import FleetConfig, parse_config
from fleet.members import router_name
from fleet.router_ports import PORTS_BETWEEN_ROUTERS

GRACE_S = 3.0
"""Of the streams that are abandoned."""
RETURN_S = 15.0
"""Of those that are not."""
DRAIN_S = 0.5
LEASE_S = 10.0
"""Longer than the grace, so that it frees nothing that the end of a grace must. A router that is killed leaves the KV
of its prefills to it."""
STEP_S = 0.1
"""Slow, so that a thousand streams at once are no question of the machine."""
TOKEN_COUNT = 120
CALLER_COUNT = 40
LEAST_CUT_BYTES, MOST_CUT_BYTES = 300, 6_000
WAVE_COUNT = 3
"""Of abandoned streams: the first one fills pools and caches, the others must leave nothing on top of it."""
LEAK_BYTES = 8 * 1024
"""What a router's memory may grow by for each stream that was abandoned on it after the first wave: a part of what
one generation holds. What is counted exactly, generations kept, window bytes, leases and KV blocks, must be none."""
LEAST_JUDGED_COUNT = 400
"""Streams abandoned on one router after the first wave, of which memory is judged: of fewer ones, 8 KiB each are lost
in the allocator's own moves of some MiB."""
OPENING_COUNT = 32
"""Streams that are opened at a time: a prefill worker refuses more than it can queue."""
ABANDONED_TOKEN_COUNT = 1200
"""Such a stream would run for two minutes: none ends by itself before it is abandoned."""
LIMIT_S = 240.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume-cuts", type=int, default=500, help="sockets to cut in the middle of a stream")
    parser.add_argument("--resume-restarts", type=int, default=50, help="routers to restart meanwhile")
    parser.add_argument(
        "--resume-abandoned", type=int, default=1000, help="streams that nobody comes back to, a wave"
    )


async def run(options: argparse.Namespace) -> bool:
    """Cuts, restarts and abandoned streams on two router processes."""
    with tempfile.TemporaryDirectory() as state:
        report = await resume_drill(
            simulated_config(model_directory(), Path(state)),
            cut_count=options.resume_cuts,
            restart_count=options.resume_restarts,
            abandoned_count=options.resume_abandoned,
            seed=SEED,
        )
    evidence.write("resume", "Streams that go on", report.summary(), report.rows, report.wrong)
    return report.is_kept


def simulated_config(
    model: Path, state_dir: Path, *, vocab_size: int = 49_152, step_s: float = STEP_S
) -> FleetConfig:
    """Two routers, one prefill and two decode workers; a token takes ``step_s``. ``vocab_size``: the model's."""
    listen, admin, metrics = _ports_for_two_routers()
    engine = 'kind = "simulated"\nkv_cache_bytes = 34359738368\nblock_token_count = 16\nmax_running_count = 1024'
    cost = (
        "cost = {prefill = {base_s = 0.002, per_token_s = 1e-5, per_token_squared_s = 0.0}, "
        f"decode = {{base_s = {step_s}, per_context_token_s = 0.0, per_sequence_s = 0.0}}}}\n"
        f"tokens = {{vocab_size = {vocab_size}}}"
    )
    return parse_config(f"""
        [cluster]
        runner = "local"
        state_dir = "{state_dir}"
        router_count = 2
        restart_delay_max_s = 1.0
        [model]
        name = "simulated"
        path = "{model}"
        [router]
        listen_address = "127.0.0.1:{listen}"
        admin_address = "127.0.0.1:{admin}"
        metrics_address = "127.0.0.1:{metrics}"
        lease_s = {LEASE_S}
        drain_grace_s = {DRAIN_S}
        max_in_flight_count = 2048
        max_resumable_count = 4096
        log_level = "WARNING"
        [prefill]
        count = 1
        [prefill.engine]
        {engine}
        enable_prefix_caching = false
        [prefill.simulated]
        {cost}
        [decode]
        count = 2
        [decode.engine]
        {engine}
        enable_prefix_caching = false
        [decode.simulated]
        {cost}
    """)


@dataclass
class Report:
    """What was found."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    memory_verdict: str = "not judged: no waves"

    @property
    def is_kept(self) -> bool:
        return not self.wrong and not self.broken

    def summary(self) -> list[str]:
        return [
            f"two router processes (drain {DRAIN_S:g} s, started again by the fleet), one prefill and two decode "
            f"workers with simulated engines, {1 / STEP_S:g} tokens/s a stream, {TOKEN_COUNT} tokens, {CALLER_COUNT} "
            "callers at a time",
            "compared with the uncut stream: token ids, text, finish reason, token count; a gap, a repeat or a chunk "
            "after the end fails by itself",
            f"leases of {LEASE_S:g} s: they free the KV of a router that was killed, and nothing in the waves below",
            *self.notes,
            "identities here are tenants; that of API keys is tested with the public API's other tests",
            f"memory of the routers after the grace: {self.memory_verdict}",
            "promise (every concatenation equals the uncut stream; no other identity attaches; generations, windows, "
            "leases and KV at baseline after the grace): "
            + ("kept" if self.is_kept else f"BROKEN: {len(self.wrong)} wrong answers; {'; '.join(self.broken)}"),
        ]


def judge_memory(memory: Sequence[Mapping[str, int]], count: int) -> tuple[str, bool]:
    """(In words, whether it may be so.) ``memory``: bytes of each router after each wave of ``count`` streams, of
    which each router has its even share. The first wave fills pools and caches: the slope is that of the others."""
    judged_count = (len(memory) - 1) * count // len(memory[0])
    slopes = {name: (memory[-1][name] - memory[0][name]) / max(1, judged_count) for name in memory[0]}
    told = ", ".join(f"{name} {slope:+.0f}" for name, slope in slopes.items())
    told = f"bytes for each of the {judged_count} streams abandoned on it after the first wave: {told}"
    if judged_count < LEAST_JUDGED_COUNT:
        return f"too few to judge memory ({judged_count}, of which {LEAST_JUDGED_COUNT} are the least); {told}", True
    is_kept = max(slopes.values()) <= LEAK_BYTES
    return f"{told}; at most {LEAK_BYTES}: " + ("kept" if is_kept else "BROKEN"), is_kept


def lacking_resumes(part: str, resumes: Mapping[str, int], least: Mapping[str, int]) -> list[str]:
    """What ``part`` lacks of ``least``, by kind: without it its answers prove nothing about resuming."""
    return [
        f"{part}: only {resumes.get(kind, 0)} streams were {kind}, {count} are the least"
        for kind, count in least.items()
        if resumes.get(kind, 0) < count
    ]


async def resume_drill(
    config: FleetConfig, *, cut_count: int, restart_count: int, abandoned_count: int, seed: int
) -> Report:
    """All three parts on one fleet."""
    rng = random.Random(seed)  # noqa: S311 replayable
    report = Report()
    async with running_fleet(config, start_timeout_s=120.0) as fleet:
        whole = await _uncut(fleet)
        drill = _Drill(fleet, rng, report, whole)
        parts = {
            "cuts": drill.cuts(cut_count),
            "restarts": drill.restarts(restart_count),
            "abandoned": drill.abandoned(abandoned_count),
            "strangers": drill.strangers(),
        }
        for name, part in parts.items():
            began = asyncio.get_running_loop().time()
            try:
                await part
            except Exception as error:  # the page is written whatever was found
                report.broken.append(f"{name} ended with {error!r}")
                say(f"resume: {report.broken[-1]}")
            say(f"resume: {name} took {asyncio.get_running_loop().time() - began:.0f} s")
    return report


class _Drill:
    def __init__(self, fleet: FleetUnderTest, rng: random.Random, report: Report, whole: Sequence[Heard]) -> None:
        self._fleet = fleet
        self._rng = rng
        self._report = report
        self._whole = whole
        self._asked = 0

    async def cuts(self, wanted: int) -> None:
        """Callers whose connections each live for a random number of bytes."""
        counts: Counter[str] = Counter()
        resumes: Counter[str] = Counter()
        answer_count = 0
        async with AsyncExitStack() as stack:
            addresses = _addresses(self._fleet)
            cutters = [await stack.enter_async_context(tcp_cutter(each, self._budget)) for each in addresses]

            async def caller() -> None:
                nonlocal answer_count
                while _cut_count(counts) < wanted:
                    # Twice the same router, then twice the other one: both ways to go on are used.
                    heard = await self._ask([each.address for each in cutters for _ in range(2)])
                    answer_count += 1
                    counts.update(heard.ends)
                    counts.update(heard.calls)
                    resumes.update(heard.resumes)

            async def tell() -> None:
                while True:
                    await asyncio.sleep(10.0)
                    say(f"resume: {_cut_count(counts)} of {wanted} cuts, {answer_count} answers")

            await _all(caller, CALLER_COUNT, tell)
        self._row("socket cuts", answer_count, counts)
        self._report.notes.append(
            f"{_cut_count(counts)} streams cut by resetting their socket after {LEAST_CUT_BYTES} to {MOST_CUT_BYTES} "
            f"bytes, {answer_count} answers, {counts['ResumeGenerate']} ResumeGenerate calls, of which "
            f"{resumes['attached']} attached and {resumes['continued']} continued as another generation"
        )
        least = {"attached": math.ceil(0.1 * wanted), "continued": math.ceil(0.1 * wanted)}
        self._report.broken += lacking_resumes("cuts", resumes, least)
        if _cut_count(counts) < wanted:
            self._report.broken.append(f"only {_cut_count(counts)} cuts")

    async def restarts(self, wanted: int) -> None:
        """Routers are ended in turn, by SIGTERM and by SIGKILL, as soon as both are there."""
        counts: Counter[str] = Counter()
        resumes: Counter[str] = Counter()
        answer_count = 0
        is_over = False
        ended: Counter[str] = Counter()

        async def caller() -> None:
            nonlocal answer_count
            while not is_over:
                heard = await self._ask(_addresses(self._fleet))
                answer_count += 1
                counts.update(heard.ends)
                counts.update(heard.calls)
                resumes.update(heard.resumes)

        async def restarter() -> None:
            nonlocal is_over
            for number in range(wanted):
                await _until_two_routers(self._fleet)
                await asyncio.sleep(self._rng.uniform(0.2, 0.8))
                name = router_name(number % 2)
                sign = self._rng.choice((signal.SIGTERM, signal.SIGKILL))
                pid = int(str(self._fleet.routers()[name]["pid"]))
                os.kill(pid, sign)
                ended[sign.name] += 1
                await _until_gone(self._fleet, name, pid)
                if (number + 1) % 10 == 0:
                    say(f"resume: {number + 1} of {wanted} restarts, {answer_count} answers")
            is_over = True

        async with asyncio.TaskGroup() as group:
            for _ in range(CALLER_COUNT):
                group.create_task(caller())
            group.create_task(restarter())
        await _until_two_routers(self._fleet)
        self._row("router restarts", answer_count, counts)
        how = ", ".join(f"{count} by {name}" for name, count in sorted(ended.items()))
        self._report.notes.append(
            f"{sum(ended.values())} router restarts under load ({how}): {answer_count} answers, "
            f"{counts['ResumeGenerate']} ResumeGenerate calls, of which {resumes['attached']} attached and "
            f"{resumes['continued']} continued as another generation on the router that was left"
        )
        if sum(ended.values()) < wanted:
            self._report.broken.append(f"only {sum(ended.values())} restarts")
        # What a router knew is gone with it: each restart must have made at least one stream continue elsewhere.
        self._report.broken += lacking_resumes("restarts", resumes, {"continued": wanted})

    async def abandoned(self, count: int) -> None:
        """Waves of streams that are cut after a few tokens, and that nobody comes back to."""
        if not count:
            return
        for _ in range(120):  # what the other parts left is in its grace
            left = await self._held()
            if not any(left.values()):
                break
            await asyncio.sleep(0.5)
        else:
            self._report.broken.append(f"cuts and restarts left {left}")
            return
        memory: list[dict[str, int]] = []
        most_left: dict[str, float] = dict.fromkeys(left, 0.0)
        for wave in range(WAVE_COUNT):
            await self._abandon(count)
            held = await self._held()
            await asyncio.sleep(GRACE_S + 1.0)
            quiet_s = await self._fleet.quiet_after_s(None, 10.0)
            left = await self._held()
            for _ in range(10):  # a machine that is busy notices a cut late
                if not any(left.values()):
                    break
                await asyncio.sleep(0.5)
                left = await self._held()
            memory.append(self._router_bytes())
            most_left = {name: max(number, left[name]) for name, number in most_left.items()}
            self._report.rows.append(
                {
                    "part": f"abandoned, wave {wave + 1}",
                    "answers": count,
                    "calls": f"kept {held['kept']:g}, KV blocks {held['blocks']:g}",
                    "ends": f"after grace: kept {left['kept']:g}, detached {left['detached']:g}, window bytes "
                    f"{left['window_bytes']:g}, KV blocks {left['blocks']:g}, "
                    f"leases {left['leases']:g}, rest {quiet_s:.2f} s later; router MiB "
                    + ", ".join(f"{bytes_ / 2**20:.1f}" for bytes_ in memory[-1].values()),
                    "wrong": int(any(left.values())),
                }
            )
            say(f"resume: {self._report.rows[-1]}")
            if held["kept"] < 0.9 * count or not held["blocks"]:
                self._report.broken.append(f"wave {wave + 1}: the streams were not there to be abandoned: {held}")
            if any(left.values()):
                self._report.broken.append(f"wave {wave + 1} left {left}")
        self._report.memory_verdict, is_flat = judge_memory(memory, count)
        self._report.notes.append(
            f"{len(memory)} waves of {count} abandoned streams (grace {GRACE_S:g} s); the most that was left after "
            "one: " + ", ".join(f"{name} {number:g}" for name, number in most_left.items())
        )
        if not is_flat:
            self._report.broken.append(f"memory: {self._report.memory_verdict}")

    async def strangers(self) -> None:
        """Nobody but the tenant that began it attaches to a generation, on either router."""
        denied = 0
        addresses = _addresses(self._fleet)
        async with channel_to(addresses[0]) as mine, channel_to(addresses[1]) as theirs:
            request = _requests(GRACE_S)[0]
            request.tenant = "mine"
            heard = Heard(request)
            call = _stub(mine).Generate(request, timeout=30)
            async for response in call:
                heard.take(response)
                if heard.next_index >= 3:
                    break
            for stub in (_stub(mine), _stub(theirs)):
                for tenant in ("", "yours", "mine2"):
                    message = heard.resume_request()
                    message.tenant = tenant
                    try:
                        async for _ in stub.ResumeGenerate(message, timeout=10):
                            break
                    except grpc.aio.AioRpcError as error:
                        denied += from_rpc_error(error).reason is Reason.RESUME_DENIED
            async for response in call:
                heard.take(response)
        self._report.notes.append(f"another identity tried to attach 6 times, on both routers: {denied} times denied")
        if denied != 6 or not _is_same(heard, self._whole[0]):
            self._report.broken.append("another identity was not denied, or disturbed the stream")

    # Parts

    async def _ask(self, addresses: Sequence[str]) -> Heard:
        """One answer, asked of these routers in turn, compared."""
        number, self._asked = self._asked % len(self._whole), self._asked + 1
        request = _requests(RETURN_S)[number]
        first = self._rng.randrange(len(addresses))
        async with AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(channel_to(address)) for address in addresses]
            heard = Heard(request)
            try:
                async with asyncio.timeout(LIMIT_S):
                    await ResumingCaller(channels).ask(request, first=first, heard=heard)
            except Exception as error:
                self._wrong(number, heard, f"{type(error).__name__}: {error}")
                return heard
        if not _is_same(heard, self._whole[number]):
            self._wrong(number, heard, "differs from the uncut stream")
        return heard

    def _wrong(self, number: int, heard: Heard, why: str) -> None:
        self._report.wrong.append(
            {
                "request": number,
                "why": why,
                "tokens": len(heard.token_ids),
                "calls": dict(heard.calls),
                "ends": dict(heard.ends),
                "generations": heard.generation_ids,
            }
        )
        say(f"resume: WRONG {self._report.wrong[-1]}")

    def _row(self, part: str, answer_count: int, counts: Counter[str]) -> None:
        calls = {name: counts.pop(name, 0) for name in ("Generate", "ResumeGenerate")}
        self._report.rows.append(
            {
                "part": part,
                "answers": answer_count,
                "calls": ", ".join(f"{name} {count}" for name, count in calls.items()),
                "ends": ", ".join(f"{name} {count}" for name, count in sorted(counts.items())),
                "wrong": len(self._report.wrong),
            }
        )
        counts.update(calls)
        say(f"resume: {self._report.rows[-1]}")

    def _budget(self) -> int:
        return self._rng.randrange(LEAST_CUT_BYTES, MOST_CUT_BYTES)

    async def _abandon(self, count: int) -> None:
        """Half are cut by their callers' leaving, half by a socket that is reset under them."""
        async with AsyncExitStack() as stack:
            addresses = _addresses(self._fleet)
            cutters: list[TcpCutter] = [await stack.enter_async_context(tcp_cutter(each)) for each in addresses]
            targets = [*addresses, *(each.address for each in cutters)]
            channels = [await stack.enter_async_context(channel_to(address)) for address in targets]
            gate = asyncio.Semaphore(OPENING_COUNT)

            async def begin(number: int) -> Any:
                request = _requests(GRACE_S)[number % 2]
                request.stop.max_output_token_count = ABANDONED_TOKEN_COUNT
                async with gate:
                    call = _stub(channels[number % len(channels)]).Generate(request, timeout=240)
                    heard = Heard(request)
                    async for response in call:
                        heard.take(response)
                        if heard.next_index >= 2:
                            break
                return call

            began = asyncio.get_running_loop().time()
            calls = await asyncio.gather(*(begin(number) for number in range(count)))
            say(f"resume: {count} streams opened in {asyncio.get_running_loop().time() - began:.1f} s")
            for cutter in cutters:
                cutter.cut_all()
            for call in calls:
                call.cancel()

    async def _held(self) -> dict[str, float]:
        """What both routers and all engines hold, by their own count."""
        pages = [await asyncio.to_thread(_page, str(each["metrics_address"])) for each in self._routers()]
        books = await self._fleet.books()
        return {
            "kept": sum(page["baton_resumable_generations"] for page in pages),
            "detached": sum(page["baton_detached_generations"] for page in pages),
            "window_bytes": sum(page["baton_replay_window_bytes"] for page in pages),
            "in_flight": sum(page["baton_in_flight_requests"] for page in pages),
            "blocks": sum(book.used_block_count for book in books.values()),
            "leases": sum(book.held_lease_count for book in books.values()),
        }

    def _routers(self) -> list[Mapping[str, object]]:
        return [endpoint for _, endpoint in sorted(self._fleet.routers().items())]

    def _router_bytes(self) -> dict[str, int]:
        return {name: _rss_bytes(int(str(each["pid"]))) for name, each in sorted(self._fleet.routers().items())}


async def _uncut(fleet: FleetUnderTest) -> list[Heard]:
    """The answers, asked without ``resume`` and never cut."""
    async with channel_to(_addresses(fleet)[0]) as channel:

        async def ask(request: pb.GenerateRequest) -> Heard:
            request.ClearField("resume")
            heard = Heard(request)
            async for response in _stub(channel).Generate(request, timeout=120):
                heard.take(response)
            assert heard.finished is not None
            return heard

        return await asyncio.gather(*(ask(request) for request in _requests(1.0)))


def _requests(grace_s: float) -> list[pb.GenerateRequest]:
    """What is asked: text and tokens, held-back text, chunks of one token, logprobs, an end by a stop sequence."""
    requests = []
    for number in range(6):
        request = pb.GenerateRequest()
        if number == 1:
            request.token_ids.ids.extend(range(40, 140))
        else:
            request.text = f"Tell me story number {number}, slowly and in many words."
        request.stop.max_output_token_count = TOKEN_COUNT
        request.stop.ignore_eos = True
        request.output.content = pb.OutputOptions.CONTENT_BOTH
        request.resume.grace.FromMilliseconds(round(grace_s * 1000))
        match number:
            case 2:
                request.stop.stop_sequences.extend(["this never comes", "nor this"])
            case 3:
                request.output.max_chunk_token_count = 1
            case 4:
                request.output.top_logprob_count = 2
            case 5:
                request.stop.stop_sequences.extend(["q", "Z", "9"])
                request.stop.min_output_token_count = TOKEN_COUNT // 2
        requests.append(request)
    return requests


def _is_same(heard: Heard, whole: Heard) -> bool:
    def said(one: Heard) -> tuple[Any, ...]:
        finished = one.finished
        assert finished is not None
        return (
            one.token_ids,
            one.text,
            finished.reason,
            finished.matched_stop_sequence,
            finished.usage.prompt_token_count,
            finished.usage.output_token_count,
        )

    return heard.finished is not None and said(heard) == said(whole)


def _cut_count(counts: Counter[str]) -> int:
    return sum(count for name, count in counts.items() if name.startswith("cut"))


async def _all(caller: Any, count: int, beside: Any) -> None:
    """``count`` callers to their end, ``beside`` until then."""
    other = asyncio.create_task(beside())
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(caller())
    finally:
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)


def _addresses(fleet: FleetUnderTest) -> list[str]:
    """Of both routers, whether they are there or not."""
    host, _, port = fleet.config.router.listen_address.rpartition(":")
    return [f"{host}:{int(port) + index * PORTS_BETWEEN_ROUTERS}" for index in range(2)]


async def _until_two_routers(fleet: FleetUnderTest) -> None:
    """Both are there, and would place a request."""
    async with asyncio.timeout(60.0):
        while len(fleet.routers()) < 2:  # noqa: ASYNC110 processes tell nobody
            await asyncio.sleep(0.02)
        for address in _addresses(fleet):
            async with BatonClient(address) as client:
                await client.wait_until_serving(timeout=30.0)


async def _until_gone(fleet: FleetUnderTest, name: str, pid: int) -> None:
    async with asyncio.timeout(60.0):
        while fleet.routers().get(name, {}).get("pid") == pid:  # noqa: ASYNC110 processes tell nobody
            await asyncio.sleep(0.02)


def _page(address: str) -> dict[str, float]:
    """The metrics without labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    pairs = (line.split(" ") for line in lines if line.startswith("baton_") and "{" not in line)
    return {name: float(value) for name, value in pairs}


def _rss_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGESIZE")


def _stub(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]


def _ports_for_two_routers() -> tuple[int, int, int]:
    """Listening, admin and metrics port of the first router, such that the second one's are free, too."""
    for _ in range(100):
        listen, admin, metrics = free_ports(3)
        wanted = [listen + PORTS_BETWEEN_ROUTERS, admin + PORTS_BETWEEN_ROUTERS, metrics + 1]
        if len({listen, admin, metrics, *wanted}) < 6 or max(wanted) > 65535:
            continue
        try:
            for port in wanted:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return listen, admin, metrics
    raise AssertionError("no ports for two routers")
