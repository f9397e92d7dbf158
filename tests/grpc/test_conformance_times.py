"""What answers say of time, transfers and attempts, exactly: the simulated engines' scripted times, in virtual time.

Each phase has a length of its own that nothing else has, so that a swap, a phase left out or one counted twice shows.
The same fields over sockets, where only bounds can be told, are in test_conformance_answers.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from field_register import Register
from raw_calls import Outcome
from sim_cluster import RULE
from virtual_calls import Context, VirtualCluster, now, virtual_cluster

from baton.leg import KvAdopted, RecomputeReason
from baton.testing import run_virtual
from baton.v1 import generation_pb2 as pb
from engine.cost import CostModel, DecodeCost, PrefillCost
from engine.protocol import DecodeJob
from engine.sim import SimNetwork
from engine.sim_config import PhaseDelays
from engine.sim_tokens import simulated_answer
from kvtransfer.faults import FaultPlan
from kvtransfer.simulated import Damage, Link, Misfortune

PROMPT = tuple(range(10, 50))
"""40 tokens: three blocks of 16, the last one not full."""
COUNT = 12
ANSWER = simulated_answer(PROMPT, COUNT, RULE, ignore_eos=True)
COST = CostModel(
    prefill=PrefillCost(base_s=0.5, per_token_s=0.01, per_token_squared_s=0.0),
    decode=DecodeCost(base_s=0.03, per_context_token_s=0.0, per_sequence_s=0.0),
)
LINK = Link(latency_s=0.25, bytes_per_s=1e7)
BLOCK_BYTES = 16 * COST.kv_bytes_per_token
TRANSFER_S = 0.25 + 3 * BLOCK_BYTES / 1e7
STEP_S = 0.03 + 0.02
OF_PREFILLS = PhaseDelays(queue=0.7, prefill=0.2)
OF_DECODES = PhaseDelays(queue=1.1, transfer=0.4, decode_wait=0.15, decode=0.02)
SIX = ("queue", "prefill", "handoff_wait", "kv_transfer", "decode_wait", "decode")
register = Register()


def prefill_s(token_count: int) -> float:
    return 0.5 + 0.01 * token_count + 0.2


def request(count: int = COUNT, **changes: Any) -> pb.GenerateRequest:
    stop = pb.StopConditions(max_output_token_count=count, ignore_eos=True)
    return pb.GenerateRequest(**{"token_ids": pb.TokenIds(ids=PROMPT), "stop": stop, **changes})


Scenario = Callable[[VirtualCluster], Coroutine[Any, Any, None]]


def scripted(directory: Path, scenario: Scenario, *, sim: dict[str, Any] | None = None, **options: Any) -> None:
    """Runs ``scenario`` in virtual time, before engines with the times above."""

    async def run() -> None:
        network = options.pop("network", None) or SimNetwork(LINK)
        async with virtual_cluster(
            directory, sim={"cost": COST, **(sim or {})}, network=network, **options
        ) as cluster:
            for worker in cluster.workers.values():
                worker.engine.extra_delay_s = OF_PREFILLS if worker.worker_id.startswith("prefill") else OF_DECODES
            await scenario(cluster)

    run_virtual(run())


def seconds(duration: Any) -> float:
    return float(duration.seconds) + float(duration.nanos) / 1e9


def near(value: float) -> Any:
    """To the nanosecond that a Duration tells, give or take one."""
    return pytest.approx(value, abs=2e-9)


def phases(outcome: Outcome) -> dict[str, float]:
    return {name: seconds(getattr(outcome.finished.phases, name)) for name in SIX}


def all_of(**given: float) -> Any:
    return {name: near(given.get(name, 0.0)) for name in SIX}


@register.shows(
    *(f"PhaseTimings.{name}" for name in SIX),
    "PhaseTimings.time_to_first_token",
    "PhaseTimings.kv_transfer_byte_count",
    "PhaseTimings.kv_transfer_descriptor_count",
    "PhaseTimings.kv_pull_count",
    "PhaseTimings.attempt_count",
    "PhaseTimings.recomputed_token_count",
    "Finished.phases",
)
def test_each_phase_of_a_split_request_is_as_long_as_its_engine_was_told(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        context, began = Context(timeout=100), now()
        outcome = await cluster.generate(request(), context=context)
        assert phases(outcome) == all_of(
            queue=0.7,
            prefill=prefill_s(40),
            handoff_wait=1.1,
            kv_transfer=0.4 + TRANSFER_S,
            decode_wait=0.15,
            decode=(COUNT - 1) * STEP_S,
        )
        timings = outcome.finished.phases
        at = [each_at - began for each_at, _ in context.written]
        assert sum(phases(outcome).values()) == near(at[-1]), "the six add up to the time until the last message"
        assert seconds(timings.time_to_first_token) == near(at[1]) == near(0.7 + prefill_s(40))
        assert at[0] == near(0.0), "Started is sent when it was admitted"
        tokens_at = [at for at, message in context.written if message.chunk.token_count]
        gaps = [later - earlier for earlier, later in pairwise(tokens_at)]
        assert gaps == [near(1.1 + 0.4 + TRANSFER_S + 0.15 + STEP_S), *[near(STEP_S)] * (COUNT - 2)]
        assert timings.kv_transfer_byte_count == 3 * BLOCK_BYTES
        assert (timings.kv_transfer_descriptor_count, timings.kv_pull_count) == (3, 1)
        assert (timings.attempt_count, timings.recomputed_token_count) == (1, 0)

    scripted(tmp_path, scenario)


@register.shows("PhaseTimings.placement_mode", "PhaseTimings.placement_reason", "PhaseTimings.handover_mode")
def test_a_local_request_has_no_way_between_workers(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        began = now()
        outcome = await cluster.generate(request())
        timings = outcome.finished.phases
        # Its prompt is computed on the decode worker, which was given no delay of prefills.
        assert phases(outcome) == all_of(queue=1.1, prefill=0.5 + 0.4, decode=(COUNT - 1) * STEP_S)
        assert seconds(timings.time_to_first_token) == near(1.1 + 0.5 + 0.4)
        assert now() - began == near(1.1 + 0.9 + (COUNT - 1) * STEP_S)
        assert timings.placement_mode == pb.PLACEMENT_MODE_LOCAL
        assert (timings.prefill_worker_id, timings.decode_worker_id) == ("decode-0", "decode-0")
        assert timings.handover_mode == pb.HANDOVER_MODE_NONE
        counts = (
            timings.kv_transfer_byte_count,
            timings.kv_transfer_descriptor_count,
            timings.kv_pull_count,
            timings.recomputed_token_count,
        )
        assert counts == (0, 0, 0, 0)

    scripted(tmp_path, scenario, placement="local")


@register.shows("PhaseTimings.prefill_worker_id", "PhaseTimings.decode_worker_id")
def test_an_answer_of_one_token_needs_no_decode(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        outcome = await cluster.generate(request(1))
        timings = outcome.finished.phases
        assert phases(outcome) == all_of(queue=0.7, prefill=prefill_s(40))
        assert timings.placement_mode == pb.PLACEMENT_MODE_PREFILL_ONLY
        assert (timings.prefill_worker_id, timings.decode_worker_id) == ("prefill-0", "")
        assert timings.handover_mode == pb.HANDOVER_MODE_NONE
        assert (timings.kv_transfer_byte_count, timings.kv_pull_count) == (0, 0)

    scripted(tmp_path, scenario)


def test_a_request_that_waits_for_another_has_waited_exactly_so_long(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        began = now()
        first = asyncio.create_task(cluster.generate(request()))
        await asyncio.sleep(0.01)
        second = await cluster.generate(request(1))
        whole_s = sum(phases(first.result()).values())
        assert phases(second) == all_of(queue=whole_s - 0.01 + 0.7, prefill=prefill_s(40))
        assert now() - began == near(whole_s + 0.7 + prefill_s(40))

    scripted(tmp_path, scenario, max_in_flight_count=1)


# Of the transfer.


def retold(cluster: VirtualCluster, **changes: Any) -> None:
    """The decode engine says otherwise of how it came to its KV."""
    engine: Any = cluster.workers["decode-0"].engine
    decode = engine.decode

    async def telling(job: DecodeJob) -> Any:
        async for event in decode(job):
            yield replace(event, **changes) if isinstance(event, KvAdopted) else event

    engine.decode = telling


@register.shows("PhaseTimings.kv_post", "PhaseTimings.kv_wire", "PhaseTimings.kv_verify")
def test_the_parts_of_a_transfer_are_those_that_its_engine_measured(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        plain = (await cluster.generate(request())).finished.phases
        assert (seconds(plain.kv_post), seconds(plain.kv_wire), seconds(plain.kv_verify)) == (0, 0, 0)
        retold(cluster, post_s=0.011, wire_s=0.022, verify_s=0.033, descriptor_count=77, pull_count=2)
        timings = (await cluster.generate(request())).finished.phases
        parts = (seconds(timings.kv_post), seconds(timings.kv_wire), seconds(timings.kv_verify))
        assert parts == (near(0.011), near(0.022), near(0.033))
        assert (timings.kv_transfer_descriptor_count, timings.kv_pull_count) == (77, 2)

    scripted(tmp_path, scenario)


class Damaged(Misfortune):
    """Every pull comes to this harm."""

    def __init__(self, harm: Damage) -> None:
        super().__init__(FaultPlan(allow_faults=True, probability=0.0))
        self._harm = harm

    def damage(self) -> Damage:
        return self._harm


def unreachable(cluster: VirtualCluster) -> None:
    cluster.workers["prefill-0"].engine.network.cut_off("prefill-0")


def slow(cluster: VirtualCluster) -> None:
    cluster.workers["decode-0"].engine.extra_delay_s = replace(OF_DECODES, transfer=11.0)


def harmed(harm: Damage) -> Callable[[VirtualCluster], None]:
    def harm_it(cluster: VirtualCluster) -> None:
        cluster.workers["prefill-0"].engine.network.misfortune = Damaged(harm)

    return harm_it


def expired(cluster: VirtualCluster) -> None:
    """As a real engine tells it; to the simulated one what is not held any more is a failure like any other."""
    unreachable(cluster)
    retold(cluster, recompute_reason=RecomputeReason.EXPIRED)


HARMS: dict[int, tuple[Callable[[VirtualCluster], None], float]] = {
    pb.RECOMPUTE_REASON_FAILED: (unreachable, 0.25),
    pb.RECOMPUTE_REASON_TIMED_OUT: (slow, 10.0),
    pb.RECOMPUTE_REASON_EXPIRED: (expired, 0.25),
    pb.RECOMPUTE_REASON_STALE: (harmed(Damage.STALE), 0.4 + TRANSFER_S),
    pb.RECOMPUTE_REASON_CORRUPT: (harmed(Damage.CORRUPT), 0.4 + TRANSFER_S),
}
"""By reason: what brings it about, and how long the pull in vain takes."""


def test_every_recompute_reason_is_shown() -> None:
    assert set(HARMS) | {pb.RECOMPUTE_REASON_UNSPECIFIED} == set(pb.RecomputeReason.values())


@pytest.mark.parametrize("reason", HARMS, ids=lambda reason: pb.RecomputeReason.Name(reason))
@register.shows("PhaseTimings.recompute_reason", "PhaseTimings.recomputed_token_count")
def test_kv_that_cannot_be_used_is_computed_again_counted_and_explained(tmp_path: Path, reason: int) -> None:
    harm, in_vain_s = HARMS[reason]

    async def scenario(cluster: VirtualCluster) -> None:
        harm(cluster)
        outcome = await cluster.generate(request(output=pb.OutputOptions(content=pb.OutputOptions.CONTENT_TOKEN_IDS)))
        timings = outcome.finished.phases
        assert outcome.token_ids == ANSWER
        assert (timings.recompute_reason, timings.recomputed_token_count) == (reason, 40)
        assert (timings.attempt_count, timings.placement_mode) == (1, pb.PLACEMENT_MODE_SPLIT)
        assert timings.kv_transfer_byte_count == 0
        assert phases(outcome) == all_of(
            queue=0.7,
            prefill=prefill_s(40),
            handoff_wait=1.1,
            kv_transfer=in_vain_s,
            decode_wait=0.5 + 0.41,  # 41 tokens, the first of the answer included, on the decode worker
            decode=(COUNT - 2) * STEP_S,
        )

    scripted(tmp_path, scenario)


# Of attempts.


@register.shows("PhaseTimings.attempt_count")
def test_the_phases_of_all_attempts_add_up(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        began = now()
        in_place_s = 0.7 + prefill_s(40) + 1.1 + 0.4 + TRANSFER_S + 0.15
        call = asyncio.create_task(
            cluster.generate(request(output=pb.OutputOptions(content=pb.OutputOptions.CONTENT_TOKEN_IDS)))
        )
        await asyncio.sleep(in_place_s + 3.5 * STEP_S)  # four tokens are out, a fifth is being computed
        doomed = next(name for name, each in cluster.workers.items() if each.board.current().running_count)
        cluster.workers[doomed].engine.kill()
        outcome = await call
        timings = outcome.finished.phases
        assert outcome.token_ids == ANSWER
        [other] = {"decode-0", "decode-1"} - {doomed}
        assert (timings.attempt_count, timings.decode_worker_id) == (2, other)
        assert phases(outcome) == all_of(
            queue=2 * 0.7,
            prefill=prefill_s(40) + prefill_s(44),
            handoff_wait=2 * 1.1,
            kv_transfer=2 * (0.4 + TRANSFER_S),
            decode_wait=2 * 0.15,
            decode=3.5 * STEP_S + (COUNT - 5) * STEP_S,
        )
        assert sum(phases(outcome).values()) == near(now() - began)
        assert seconds(timings.time_to_first_token) == near(0.7 + prefill_s(40)), "of the first attempt"

    scripted(tmp_path, scenario, decode_count=2, is_balanced=False)


# Of deadlines.


@register.shows("Started.time_allowed")
def test_the_time_allowed_is_the_callers_less_a_margin_and_at_most_the_servers(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        for timeout, allowed_s in ((20.0, 19.95), (0.1, 0.095), (99.0, 60.0), (None, 7.0)):
            context = Context(timeout=timeout)
            await cluster.generate(request(), context=context)
            assert seconds(context.written[0][1].started.time_allowed) == near(allowed_s)
        context = Context(timeout=50.0)
        cut = asyncio.create_task(cluster.generate(request(resume=pb.ResumeOptions()), context=context))
        await asyncio.sleep(1.0)
        cut.cancel()
        token = context.written[0][1].started.resume_token
        for timeout, allowed_s in (
            (60.0, 48.95),  # it runs, and has so much left
            (60.0, 59.95),  # it has ended, and is only read
            (2.0, 1.95),
        ):
            message = pb.ResumeGenerateRequest(resume_token=token)
            again = await cluster.call("ResumeGenerate", message, timeout=timeout)
            assert again.finished.usage.output_token_count == COUNT
            assert seconds(again.started.time_allowed) == near(allowed_s)
            token = again.started.resume_token
        await cluster.call("CancelGeneration", pb.CancelGenerationRequest(resume_token=token))

    scripted(tmp_path, scenario, max_deadline_s=60.0, default_deadline_s=7.0)


IN_PLACE_S = 0.7 + prefill_s(40) + 1.1 + 0.4 + TRANSFER_S + 0.15


@pytest.mark.parametrize(
    ("deadline_s", "phase", "count"),
    [
        (0.3, "prefill", 0),  # in the engine's queue, of which the router does not know
        (0.7 + prefill_s(40) - 0.01, "prefill", 0),
        (0.7 + prefill_s(40) + 0.01, "handoff_wait", 1),
        (IN_PLACE_S - 0.16, "handoff_wait", 1),  # pulling, of which the router does not know
        (IN_PLACE_S - 0.01, "handoff_wait", 1),
        (IN_PLACE_S + 0.01, "decode", 1),
        (IN_PLACE_S + 4 * STEP_S + 0.01, "decode", 5),
    ],
)
def test_a_deadline_that_passes_names_the_phase_as_far_as_a_router_can_know_it(
    tmp_path: Path, deadline_s: float, phase: str, count: int
) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        began = now()
        outcome = await cluster.generate(
            request(), timeout=deadline_s + 0.05 if deadline_s >= 0.95 else deadline_s / 0.95
        )
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert outcome.metadata == {"phase": phase, "emitted_token_count": str(count)}
        assert sum(chunk.token_count for chunk in outcome.chunks) == count
        assert now() - began == near(deadline_s)

    scripted(tmp_path, scenario)


def test_a_deadline_that_passes_in_the_queue_says_so(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        running = asyncio.create_task(cluster.generate(request()))
        await asyncio.sleep(0.1)
        outcome = await cluster.generate(request(), timeout=1.0)
        assert outcome.reason == "DEADLINE_EXCEEDED"
        assert outcome.metadata == {"phase": "queue", "emitted_token_count": "0"}
        await running

    scripted(tmp_path, scenario, max_in_flight_count=1)


# Of resuming.


@register.shows("ResumeOptions.grace", "Started.resume_grace")
def test_a_generation_waits_for_its_caller_exactly_as_long_as_its_grace(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        for asked_s, given_s in ((2.0, 2.0), (None, 30.0), (1e6, 300.0)):
            options = pb.ResumeOptions()
            if asked_s is not None:
                options.grace.FromMicroseconds(round(asked_s * 1e6))
            for late_s, reason in ((-0.001, ""), (0.001, "RESUME_UNKNOWN")):
                begun = await cluster.generate(request(resume=options))
                assert seconds(begun.started.resume_grace) == near(given_s)
                await asyncio.sleep(given_s + late_s)
                message = pb.ResumeGenerateRequest(resume_token=begun.started.resume_token, next_token_index=COUNT)
                again = await cluster.call("ResumeGenerate", message)
                assert again.reason == reason
                if not reason:
                    token = again.started.resume_token
                    await cluster.call("CancelGeneration", pb.CancelGenerationRequest(resume_token=token))

    scripted(tmp_path, scenario, lease_s=600.0)


# Of chunks and order.


@register.shows("OutputOptions.max_chunk_token_count")
@pytest.mark.parametrize("most", [1, 7, 100, None])
def test_tokens_that_waited_share_a_chunk_up_to_the_most_asked_for(tmp_path: Path, most: int | None) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        pauses = iter((0.0, IN_PLACE_S + 160.5 * STEP_S))  # the caller does not read on after the first chunk
        context = Context(timeout=100, on_write=lambda _: next(pauses, 0.0))
        output = pb.OutputOptions(max_chunk_token_count=most)
        outcome = await cluster.generate(request(200, output=output), context=context)
        chunks = [chunk for chunk in outcome.chunks if chunk.token_count]
        assert max(chunk.token_count for chunk in chunks) == (64 if most is None else most)
        assert chunks[-1].token_count == 1, "who has caught up gets each token when it comes"
        ends = [chunk.first_token_index + chunk.token_count for chunk in chunks]
        assert [chunk.first_token_index for chunk in chunks] == [0, *ends[:-1]]
        assert ends[-1] == 200

    scripted(tmp_path, scenario)


@register.shows("OutputOptions.max_chunk_token_count")
@pytest.mark.parametrize("has_window", [False, True])
def test_more_than_1024_tokens_asked_for_in_a_chunk_mean_1024(tmp_path: Path, *, has_window: bool) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        pauses = iter((0.0, IN_PLACE_S + 1250 * STEP_S))
        context = Context(timeout=1000, on_write=lambda _: next(pauses, 0.0))
        asked = request(1200, output=pb.OutputOptions(max_chunk_token_count=2**31 - 1))
        if has_window:
            asked.resume.SetInParent()
        outcome = await cluster.generate(asked, context=context)
        counts = [chunk.token_count for chunk in outcome.chunks]
        assert (max(counts), sum(counts)) == (1024, 1200)

    scripted(tmp_path, scenario)


@register.shows("GenerateRequest.priority")
def test_the_larger_priority_is_served_first_and_among_equals_who_came_first(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        ended: list[int] = []

        async def ask(priority: int, name: int) -> None:
            await cluster.generate(request(1, priority=priority))
            ended.append(name)

        async with asyncio.TaskGroup() as group:
            for name, priority in enumerate((0, -100, 0, 100, 1, 0)):
                group.create_task(ask(priority, name))
                await asyncio.sleep(0.001)
        assert ended == [0, 3, 4, 2, 5, 1]

    scripted(tmp_path, scenario, max_in_flight_count=1)


@register.shows("GenerateRequest.session_id")
def test_a_session_stays_where_it_is_and_others_are_spread(tmp_path: Path) -> None:
    async def scenario(cluster: VirtualCluster) -> None:
        places: dict[str, set[tuple[str, str]]] = {"one": set(), "two": set(), "": set()}
        for number in range(12):
            for session_id, seen in places.items():
                ids = pb.TokenIds(ids=(100 + number, *PROMPT))
                timings = (await cluster.generate(request(2, token_ids=ids, session_id=session_id))).finished.phases
                seen.add((timings.prefill_worker_id, timings.decode_worker_id))
        assert len(places["one"]) == len(places["two"]) == 1
        assert len(places[""]) > 1

    scripted(tmp_path, scenario, prefill_count=3, decode_count=3)
