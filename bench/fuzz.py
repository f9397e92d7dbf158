"""Soak section ``fuzz``: a million requests gone wrong against the router, and what became of it.

Most go to the router's handlers in process, through real serialisation (``fuzz_target``); some over real sockets. Of
every call: it ends in time, with OK or a documented reason, and no INTERNAL; its stream keeps its grammar; no error
repeats a prompt. Of the router: no turn of its event loop is long, and afterwards books, tasks, objects and memory
are as before. A case that took long is asked again, alone, and is a fault if it takes long each time: the machine's
own pauses do not repeat themselves. Any case can be seen again: ``python -m bench.fuzz --only NUMBER``.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import itertools
import json
import logging
import os
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc.aio

from baton.event_loop import runner
from bench import evidence
from bench.fuzz_mutations import GENERATE, METHODS, RESUME, WATCHWORD, Case, case_of
from bench.fuzz_target import DEFAULT_DEADLINE_S, Ending, FuzzTarget, fuzz_target
from bench.soaking import SEED, say

CONCURRENCY = 24
WARM_UP_SHARE = 0.1
"""Of the cases, before memory and objects are taken as the baseline: pools, caches and windows fill up first."""
LATE_S = 2.0
"""A call that ends so long after its deadline is late. Two processes and whatever else share two cores."""
LONGEST_TURN_S = 0.1
"""CPU time that one call may keep the event loop from all others."""
AGAIN_COUNT = 3
"""Times that a slow case is asked again. One that is quick once was not slow of itself."""
MOST_SLOW_COUNT, CASES_PER_SLOW = 200, 100
"""Of a part's cases so many are asked again, or one in so many, whichever is more: on a machine that others use whole
bunches are late. More are no pauses of the machine."""
HANG_LIMIT_S = 120.0
"""A call that has not ended by then, which is a multiple of any deadline, never will."""
REST_LIMIT_S = 30.0
MOST_MEMORY_BYTES = 16 * 2**30
"""Of addresses, of this process and of the one that parses answers; what is used is a small part of it."""
GROWTH_BYTES, GROWTH_SHARE = 48 * 2**20, 0.25
"""Memory that may come on top after the warm-up: the allocator's, at most the larger of the two."""
OBJECTS = 20_000
CASES_PER_OBJECT, SLACK_OBJECTS = 200, 500
"""Of the last third of the cases: objects may grow by fewer than one in so many cases. The slack is for runs of a few
thousand cases, which end before the router's window of phases (some thousand samples) is full."""
BYTES_PER_CASE, SLACK_BYTES = 128, 20 * 2**20
"""The same of memory; the slack is for pages that the allocator keeps once a few large requests came together (13 MiB
were seen)."""
GROWS_ON_SHARE = 0.5
"""Growth of the last third that is a smaller share of the middle one's is a cache that fills; a leak grows on."""
TOLD_COUNT = 40

REASONS = {
    "INVALID_REQUEST": ("INVALID_ARGUMENT",),
    "PROMPT_TOO_LONG": ("INVALID_ARGUMENT",),
    "MODEL_NOT_FOUND": ("NOT_FOUND",),
    "QUEUE_FULL": ("RESOURCE_EXHAUSTED",),
    "DEADLINE_EXCEEDED": ("DEADLINE_EXCEEDED",),
    "PERMISSION_DENIED": ("PERMISSION_DENIED",),
    "RESUME_UNKNOWN": ("NOT_FOUND",),
    "RESUME_DENIED": ("PERMISSION_DENIED",),
    "RESUME_TOO_LATE": ("OUT_OF_RANGE",),
    "ATTACHED_ELSEWHERE": ("ABORTED",),
    "TOO_MANY_RESUMABLE": ("RESOURCE_EXHAUSTED",),
    "by gRPC": ("CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"),
}
"""What a call here may end with, and the statuses of each. No worker is lost here, so the reasons that tell of one
would be a fault."""


@dataclass
class Findings:
    """What a part saw. ``faults``: what must not be, as text, with the case's number."""

    count: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    slowest: list[tuple[float, int]] = field(default_factory=list)
    """(CPU seconds, number) of the longest turns."""
    slow: dict[int, str] = field(default_factory=dict)
    """Cases that took long when they were first asked, and how."""

    def note(self, case: Case, ending: Ending) -> None:
        self.count += 1
        self.outcomes[f"{ending.status} {ending.reason}".strip()] += 1
        for fault in faults_of(case, ending):
            self.fault(f"{_name(case)}: {fault}")
        for delay in delays_of(case, ending):
            self.slow[case.number] = f"{_name(case)}: {delay}"
        if len(self.slowest) < 5 or ending.longest_turn_s > self.slowest[-1][0]:
            self.slowest = sorted([*self.slowest, (ending.longest_turn_s, case.number)], reverse=True)[:5]

    def fault(self, text: str) -> None:
        self.fault_count += 1
        if len(self.faults) < TOLD_COUNT:
            self.faults.append(text)

    def plain(self) -> dict[str, Any]:
        return {**vars(self), "outcomes": dict(self.outcomes)}

    def add(self, other: dict[str, Any]) -> None:
        self.count += other["count"]
        self.outcomes.update(other["outcomes"])
        self.faults += other["faults"]
        self.fault_count += other["fault_count"]
        self.slowest = sorted([*self.slowest, *map(tuple, other["slowest"])], reverse=True)[:5]
        self.slow.update((int(number), delay) for number, delay in other["slow"].items())


def _name(case: Case) -> str:
    return f"case {case.number} ({case.path.rpartition('/')[2]})"


def faults_of(case: Case, ending: Ending) -> Iterator[str]:
    """Everything that must not be about one ending but the time it took."""
    if ending.bug:
        yield ending.bug
    if ending.status == "OK":
        if not ending.messages:
            yield "OK without an answer"
        elif case.path in (GENERATE, RESUME):
            yield from _grammar_faults(ending.messages, is_resumed=case.path == RESUME)
    elif ending.status not in REASONS.get(ending.reason, ()):
        yield f"ended with {ending.status} {ending.reason or 'and no reason'}: {ending.text[:200]}"
    elif ending.reason == "INVALID_REQUEST" and not ending.violation_count:
        yield "INVALID_REQUEST without a field violation"
    # A model's name is repeated, cut and made printable; garbled bytes may make a prompt the name of a model.
    is_told = WATCHWORD in ending.text or WATCHWORD.encode() in ending.details
    if is_told and ending.reason != "MODEL_NOT_FOUND":
        yield "the error repeats the prompt"


def delays_of(case: Case, ending: Ending) -> Iterator[str]:
    """What took too long; it may be the machine's doing."""
    allowed_s = DEFAULT_DEADLINE_S if case.timeout_s is None else case.timeout_s
    if ending.seconds > allowed_s + LATE_S:
        yield f"ended {ending.seconds - allowed_s:.2f} s after its deadline"
    if ending.longest_turn_s > LONGEST_TURN_S:
        yield f"kept the event loop for {ending.longest_turn_s:.3f} s of CPU time with {len(case.data)} bytes"


def _grammar_faults(messages: list[Any], *, is_resumed: bool) -> Iterator[str]:
    words = [message.WhichOneof("event") for message in messages]
    shape = "".join(
        {"started": "S", "prompt": "P", "chunk": "C", "finished": "F"}.get(str(word), "?") for word in words
    )
    rest = shape.removeprefix("S").removesuffix("F").lstrip("P").strip("C")
    if not shape.startswith("S") or not shape.endswith("F") or len(shape) < 2 or rest:
        yield f"the stream was {shape[:40]}"
        return
    next_index: dict[int, int] = {}
    for message in messages:
        if message.WhichOneof("event") != "chunk":
            continue
        chunk = message.chunk
        begins_at = next_index.get(chunk.sample_index)
        if begins_at is None:
            begins_at = chunk.first_token_index if is_resumed else 0
        if chunk.first_token_index != begins_at:
            yield f"a chunk began at {chunk.first_token_index}, not at {begins_at}"
        next_index[chunk.sample_index] = chunk.first_token_index + chunk.token_count
    output_token_count = messages[-1].finished.usage.output_token_count
    if not is_resumed and sum(next_index.values()) != output_token_count:
        yield f"{sum(next_index.values())} tokens were sent and {output_token_count} billed"


@dataclass(frozen=True)
class _Rest:
    """What a router at rest has."""

    memory_bytes: int
    object_count: int
    task_count: int


async def _at_rest(target: FuzzTarget, findings: Findings, when: str) -> _Rest:
    left = await target.at_rest(REST_LIMIT_S)
    if left:
        findings.fault(f"{when} there is left after {REST_LIMIT_S:g} s: {left}")
    await asyncio.sleep(2.0)  # longer than the longest grace of what is kept for a caller's return
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that what is left is held by somebody
    return _Rest(_memory_bytes(), len(gc.get_objects()), len(asyncio.all_tasks()))


def _memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def fuzz_part(
    numbers: range,
    *,
    seed: int,
    by_wire: bool,
    tell: bool = False,
    judge_machine: bool = True,
    concurrency: int = CONCURRENCY,
    **config: Any,
) -> dict[str, Any]:
    """Runs the cases of ``numbers``. Returns findings and what was at rest, as plain data.

    ``judge_machine``: False where others share the process or the machine, as in a test: what depends on them, time
    and the process' memory, is then told and is no fault. ``config``: changes to the router's.
    """
    findings = Findings()
    with tempfile.TemporaryDirectory() as directory:
        async with fuzz_target(Path(directory), **config) as target:
            warm_up_count = max(1, int(len(numbers) * WARM_UP_SHARE))
            await _run_cases(target, numbers[:warm_up_count], seed, by_wire, findings, concurrency, tell)
            before = await _at_rest(target, findings, "after the warm-up")
            cuts = [warm_up_count, *(max(warm_up_count, round(len(numbers) * part / 3)) for part in (1, 2, 3))]
            rests: list[_Rest] = []
            for third, (start, end) in enumerate(itertools.pairwise(cuts), 1):
                await _run_cases(target, numbers[start:end], seed, by_wire, findings, concurrency, tell)
                rests.append(await _at_rest(target, findings, f"after {third} of 3 thirds"))
            after = rests[-1]
            if judge_machine:
                await _ask_slow_again(target, seed, by_wire, findings)
            if not await target.engines_alive():
                findings.fault("an engine died")
            if not target.router.health.is_serving:
                findings.fault("the router does not serve any more")
    if not judge_machine:
        before, *rests = (replace(rest, memory_bytes=0) for rest in (before, *rests))
    for fault in (*growth_faults(before, rests[-1]), *trend_faults(rests, cuts[3] - cuts[2])):
        findings.fault(fault)
    thirds = [asdict(rest) for rest in rests]
    return {**findings.plain(), "before": asdict(before), "after": asdict(after), "thirds": thirds}


def growth_faults(before: _Rest, after: _Rest) -> Iterator[str]:
    more_bytes = after.memory_bytes - before.memory_bytes
    if more_bytes > max(GROWTH_BYTES, GROWTH_SHARE * before.memory_bytes):
        yield f"memory grew from {before.memory_bytes >> 20} to {after.memory_bytes >> 20} MiB"
    if after.object_count - before.object_count > OBJECTS:
        yield f"objects grew from {before.object_count} to {after.object_count}"
    if after.task_count > before.task_count:
        yield f"tasks grew from {before.task_count} to {after.task_count}"


def trend_faults(rests: Sequence[_Rest], last_count: int) -> Iterator[str]:
    """What grows on. ``rests``: after each third of the cases; ``last_count``: cases of the last one."""
    first, second, third = rests
    for what, allowed, counts in (
        (
            "objects",
            max(SLACK_OBJECTS, last_count / CASES_PER_OBJECT),
            (first.object_count, second.object_count, third.object_count),
        ),
        (
            "bytes",
            max(SLACK_BYTES, last_count * BYTES_PER_CASE),
            (first.memory_bytes, second.memory_bytes, third.memory_bytes),
        ),
    ):
        middle, last = counts[1] - counts[0], counts[2] - counts[1]
        if last > allowed and last > GROWS_ON_SHARE * middle:
            yield f"{what} grow on: {middle:+} in the middle third, {last:+} in the last one of {last_count} cases"


async def _ask_slow_again(target: FuzzTarget, seed: int, by_wire: bool, findings: Findings) -> None:
    """One after the other, with nothing beside: who is slow each time is slow of itself."""
    most = max(MOST_SLOW_COUNT, findings.count // CASES_PER_SLOW)
    if len(findings.slow) > most:
        findings.fault(f"{len(findings.slow)} cases took long, more than the {most} that are asked again")
    async with _channel(target) as channel:
        for number, first in list(findings.slow.items())[:most]:
            case = case_of(number, seed)
            for _ in range(AGAIN_COUNT):
                delays = list(delays_of(case, await _ask(target, channel, case, by_wire, findings)))
                if not delays:
                    break
            else:
                findings.fault(f"{first}; again, alone, each of {AGAIN_COUNT} times, the last: {delays[0]}")


def _channel(target: FuzzTarget) -> grpc.aio.Channel:
    limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    return grpc.aio.insecure_channel(target.endpoint.address, options=limits)


async def _ask(
    target: FuzzTarget, channel: grpc.aio.Channel, case: Case, by_wire: bool, findings: Findings
) -> Ending:
    try:
        async with asyncio.timeout(HANG_LIMIT_S):
            return await (target.call_by_wire(channel, case) if by_wire else target.run(case))
    except TimeoutError:
        findings.fault(f"{_name(case)}: had not ended after {HANG_LIMIT_S:g} s")
        return Ending("CANCELLED", "by gRPC")


async def _run_cases(
    target: FuzzTarget,
    numbers: range,
    seed: int,
    by_wire: bool,
    findings: Findings,
    concurrency: int,
    tell: bool,
) -> None:
    waiting = iter(numbers)

    async def work(channel: grpc.aio.Channel) -> None:
        for number in waiting:
            case = case_of(number, seed)
            findings.note(case, await _ask(target, channel, case, by_wire, findings))
            if tell and findings.count % 500 == 0:
                print(json.dumps({"count": findings.count, "faults": findings.fault_count}), flush=True)

    async with _channel(target) as channel:
        await asyncio.gather(*(work(channel) for _ in range(concurrency)))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fuzzed", type=int, default=1_000_000, help="mutated requests in all")
    parser.add_argument("--fuzzed-by-wire", type=int, default=50_000, help="of these, over real sockets")
    parser.add_argument("--fuzz-seed", type=int, default=SEED)


async def run(options: argparse.Namespace) -> bool:
    """Point 6: a million mutated requests: no crash, no leak, only typed errors."""
    began_at = time.monotonic()
    core_count = os.cpu_count() or 1
    in_process = options.fuzzed - options.fuzzed_by_wire
    cuts = [round(in_process * part / core_count) for part in range(core_count + 1)]
    parts = [(range(start, end), False) for start, end in itertools.pairwise(cuts)]
    findings = Findings()
    rows: list[dict[str, Any]] = []
    for batch in (parts, [(range(in_process, options.fuzzed), True)]):
        progress: dict[int, int] = {}
        batch = [each for each in batch if each[0]]
        results = await asyncio.gather(
            *(_child(numbers, by_wire, options.fuzz_seed, progress, began_at) for numbers, by_wire in batch)
        )
        for (numbers, by_wire), result in zip(batch, results, strict=True):
            if isinstance(result, str):
                findings.fault(f"cases {numbers.start} to {numbers.stop - 1}: {result}")
                continue
            findings.add(result)
            before, after = result["before"], result["after"]
            turn_s, case_number = result["slowest"][0]
            rows.append(
                {
                    "cases": f"{numbers.start} to {numbers.stop - 1}",
                    "by": "sockets" if by_wire else "handlers",
                    "faults": result["fault_count"],
                    "slow at first": len(result["slow"]),
                    "longest turn, ms of CPU": f"{turn_s * 1000:.1f} (case {case_number})",
                    "memory, MiB": f"{before['memory_bytes'] >> 20} to {after['memory_bytes'] >> 20}",
                    "objects": f"{before['object_count']} to {after['object_count']}",
                    "KiB by third": _growths(result["thirds"], "memory_bytes", 1024),
                    "objects by third": _growths(result["thirds"], "object_count", 1),
                    "tasks": f"{before['task_count']} to {after['task_count']}",
                }
            )
    is_kept = not findings.fault_count and findings.count == options.fuzzed
    summary = [
        f"{findings.count} mutated requests of {len(METHODS)} public methods, seed {options.fuzz_seed}, in "
        f"{(time.monotonic() - began_at) / 60:.1f} min: {options.fuzzed - options.fuzzed_by_wire} to the handlers of "
        f"routers in {core_count} processes, through real serialisation, {options.fuzzed_by_wire} over real sockets",
        "endings: " + ", ".join(f"{name} {count}" for name, count in findings.outcomes.most_common()),
        f"faults: {findings.fault_count}",
        f"took long when first asked ({LATE_S:g} s past the deadline, or {LONGEST_TURN_S * 1000:g} ms of CPU in "
        f"one turn of the loop), and were asked again, alone: {len(findings.slow)}; who took long each of "
        f"{AGAIN_COUNT} times is among the faults",
        f"memory and objects: at rest, after the first {WARM_UP_SHARE:.0%} of each process' cases and at its end; by "
        f"third: grown in the middle third of the cases and in the last one, where more than 1 object in "
        f"{CASES_PER_OBJECT} cases (of few cases: {SLACK_OBJECTS}) or {BYTES_PER_CASE} bytes a case (of few: "
        f"{SLACK_BYTES >> 20} MiB), and more than {GROWS_ON_SHARE:g} of the middle third's, is a leak",
        "promise (no crash, no leak, only typed errors): " + ("kept" if is_kept else "BROKEN"),
        *(f"fault: {fault}" for fault in findings.faults[:TOLD_COUNT]),
    ]
    evidence.write("fuzz", "A million requests gone wrong", summary, rows, [findings.plain()])
    return is_kept


def _growths(thirds: Sequence[dict[str, int]], what: str, unit: int) -> str:
    values = [third[what] for third in thirds]
    return ", ".join(f"{(later - earlier) // unit:+}" for earlier, later in itertools.pairwise(values))


async def _child(
    numbers: range, by_wire: bool, seed: int, progress: dict[int, int], began_at: float
) -> dict[str, Any] | str:
    """A process of its own, so that a crash is one of it. What it found, or how it died."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.fuzz", "--part", str(numbers.start), str(numbers.stop), "--seed", str(seed)),
        *(["--by-wire"] if by_wire else []),
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    assert process.stdout is not None
    last: dict[str, Any] = {}
    told_at = 0.0
    try:
        async for line in process.stdout:
            last = json.loads(line)
            progress[numbers.start] = last["count"]
            if time.monotonic() - told_at > 15:
                told_at = time.monotonic()
                say(
                    f"fuzz: {sum(progress.values())} cases after {told_at - began_at:.0f} s; of "
                    f"{numbers.start} to {numbers.stop - 1}: {last['count']}, {last.get('faults')} faults"
                )
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if status != 0 or "before" not in last:
        return f"the process ended with status {status} after {last.get('count', 0)} cases"
    return last


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", type=int, nargs="+", help="cases to run and to tell of")
    parser.add_argument("--part", type=int, nargs=2, metavar=("FROM", "TO"), help="cases of a child, told as JSON")
    parser.add_argument("--by-wire", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    # A request that makes the router take all memory there is shall end this process, not the machine.
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    with runner() as loop:
        if options.part is not None:
            part = fuzz_part(range(*options.part), seed=options.seed, by_wire=options.by_wire, tell=True)
            print(json.dumps(loop.run(part)), flush=True)
            return 0
        return loop.run(_tell(options.only or [], options.seed, options.by_wire))


async def _tell(numbers: list[int], seed: int, by_wire: bool) -> int:
    """Runs cases one by one and shows them whole: for people."""
    fault_count = 0
    with tempfile.TemporaryDirectory() as directory:
        async with fuzz_target(Path(directory)) as target:
            for number in numbers:
                case = case_of(number, seed)
                async with grpc.aio.insecure_channel(target.endpoint.address) as channel:
                    ending = await (target.call_by_wire(channel, case) if by_wire else target.run(case))
                faults = [*faults_of(case, ending), *delays_of(case, ending)]
                fault_count += len(faults)
                say(f"{case} {case.data[:400]!r}\n  {ending} {ending.text}\n  faults: {faults}")
                left = await target.at_rest(5.0)
                if left:
                    say(f"  left: {left}")
    return 1 if fault_count else 0


if __name__ == "__main__":
    sys.exit(main())
