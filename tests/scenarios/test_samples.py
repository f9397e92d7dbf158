"""Several samples and the prompt's logprobs through router and simulated workers, in virtual time: one prefill, one
pull, nothing left whatever happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

from baton.errors import BatonError, Reason
from baton.request import PlacementMode, Role, Sampling
from baton.testing import in_virtual_time
from bench.virtual_cluster import BLOCK, RULE, TokenAnswer, VirtualCluster, virtual_cluster
from router.admission import AdmissionLimits
from router.answering import Admitted, Completed, Piece, PromptPart, RelayEvent, RoutedRequest
from router.placement import PlacementPolicy
from router.samples.fan_out import fan_out

CACHING = {"enable_prefix_caching": True}
PROMPT = 100
DRAWN = Sampling(temperature=1.0, seed=5)


@dataclass
class Heard:
    """What the caller of one stream got."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    parts: list[PromptPart] = field(default_factory=list)
    admitted_count: int = 0
    completed: Completed | None = None
    error: BatonError | None = None


def stream(
    cluster: VirtualCluster, request: RoutedRequest, count: int, timeout_s: float
) -> AsyncGenerator[Any, None]:
    now = asyncio.get_running_loop().time()
    return fan_out(
        request,
        cluster.relay.samples(count),
        lambda sample, seat: cluster.relay.run(sample, TokenAnswer(), now + timeout_s, received_at=now, seat=seat),
    )


async def ask(
    cluster: VirtualCluster,
    request: RoutedRequest,
    count: int,
    *,
    timeout_s: float = 300.0,
    on_token: Any = None,
    heard: Heard | None = None,
) -> Heard:
    heard = heard or Heard()
    try:
        async with aclosing(stream(cluster, request, count, timeout_s)) as events:
            async for event in events:
                note(heard, event)
                if on_token is not None and isinstance(event, Piece):
                    on_token(heard)
    except BatonError as error:
        heard.error = error
    return heard


def note(heard: Heard, event: RelayEvent) -> None:
    assert heard.completed is None, "an event after the last"
    match event:
        case Admitted():
            heard.admitted_count += 1
        case PromptPart():
            assert not heard.ids, "a part of the prompt after a token"
            heard.parts.append(event)
        case Piece():
            ids = heard.ids.setdefault(event.sample_index, [])
            assert event.first_token_index == len(ids), "a gap or a repeat"
            ids += event.token_ids
        case Completed():
            heard.completed = event


def assert_whole(cluster: VirtualCluster, request: RoutedRequest, heard: Heard, count: int) -> None:
    """The simulated model says the same whatever the seed."""
    assert heard.error is None, heard.error
    assert heard.admitted_count == 1
    assert heard.ids == dict.fromkeys(range(count), cluster.expected(request))
    assert heard.completed is not None
    assert [each.sample_index for each in heard.completed.samples] == list(range(count))
    assert heard.completed.usage.output_token_count == sum(map(len, heard.ids.values()))
    assert heard.completed.usage.prompt_token_count == len(request.prompt_token_ids)


def computed(cluster: VirtualCluster, worker_id: str) -> float:
    value = cluster.processes[worker_id].registry.get_sample_value("baton_worker_prefill_tokens_total")
    assert value is not None
    return value


def pulled_bytes(cluster: VirtualCluster) -> float:
    value = cluster.registry.get_sample_value("baton_kv_transfer_bytes_total")
    assert value is not None
    return value


def forget_cached(cluster: VirtualCluster) -> None:
    """Cached blocks count as used: without them the books can be seen to balance."""
    for process in cluster.processes.values():
        assert process.engine.pool.used_block_count == 0, process.engine


@in_virtual_time
async def test_eight_samples_cost_one_prefill_one_pull_and_the_prompts_blocks_once() -> None:
    async with virtual_cluster(2, 2, sim=CACHING) as cluster:
        request = cluster.request(PROMPT, 12, sampling=DRAWN)
        most_used = 0

        def look(heard: Heard) -> None:
            nonlocal most_used
            if len(heard.ids) == 8:
                most_used = max(
                    most_used, *(each.engine.pool.used_block_count for each in cluster.processes.values())
                )

        heard = await ask(cluster, request, 8, on_token=look)
        assert_whole(cluster, request, heard, 8)
        assert heard.completed is not None
        report = heard.completed.report
        assert report.mode is PlacementMode.SPLIT
        full_blocks = PROMPT // BLOCK
        tail = PROMPT - full_blocks * BLOCK
        prefilled = {name: computed(cluster, name) for name in cluster.processes}
        assert prefilled.pop(report.prefill_worker_id) == PROMPT
        assert prefilled.pop(report.decode_worker_id) == 7 * tail
        assert set(prefilled.values()) == {0.0}
        assert pulled_bytes(cluster) == report.kv_transfer_bytes  # of sample 0 alone
        assert most_used <= full_blocks + 8
        forget_cached(cluster)


@in_virtual_time
async def test_samples_of_one_token_run_where_the_first_prefilled() -> None:
    async with virtual_cluster(2, 1, sim=CACHING) as cluster:
        request = cluster.request(PROMPT, 1, sampling=DRAWN)
        heard = await ask(cluster, request, 4)
        assert_whole(cluster, request, heard, 4)
        assert heard.completed is not None
        prefilled = {name: computed(cluster, name) for name in ("prefill-0", "prefill-1")}
        cached = (PROMPT - 1) // BLOCK * BLOCK
        assert prefilled.pop(heard.completed.report.prefill_worker_id) == PROMPT + 3 * (PROMPT - cached)
        assert set(prefilled.values()) == {0.0}


@in_virtual_time
async def test_where_the_decode_worker_computes_the_prompt_the_others_find_it_there() -> None:
    async with virtual_cluster(1, 1, sim=CACHING, policy=PlacementPolicy(mode="local")) as cluster:
        request = cluster.request(PROMPT, 6, sampling=DRAWN)
        assert_whole(cluster, request, await ask(cluster, request, 5), 5)
        cached = (PROMPT - 1) // BLOCK * BLOCK
        assert computed(cluster, "decode-0") == PROMPT + 4 * (PROMPT - cached)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("token_count", [1, 5, 20, 40])
@in_virtual_time
async def test_a_lost_worker_costs_no_sample_a_token(role: Role, token_count: int) -> None:
    async with virtual_cluster(2, 2, sim=CACHING) as cluster:
        request = cluster.request(PROMPT, 12, sampling=DRAWN)
        victims: list[str] = []

        def kill(heard: Heard) -> None:
            if not victims and sum(map(len, heard.ids.values())) >= token_count:
                busy = [
                    each for each in cluster.processes.values() if each.role is role and any(each.books().values())
                ]
                for process in busy[:1]:
                    victims.append(process.worker_id)
                    process.die()

        heard = await ask(cluster, request, 4, on_token=kill)
        assert victims or role is Role.PREFILL
        assert_whole(cluster, request, heard, 4)


@pytest.mark.parametrize("after_ms", [0, 1, 5, 50, 109, 110, 111, 112, 115, 120, 121, 125, 130, 140, 200, 260])
@in_virtual_time
async def test_a_caller_who_leaves_at_any_time_leaves_nothing_of_any_sample(after_ms: int) -> None:
    async with virtual_cluster(1, 1, sim=CACHING) as cluster:
        task = asyncio.create_task(ask(cluster, cluster.request(PROMPT, 40, sampling=DRAWN), 6))
        await asyncio.sleep(after_ms / 1000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("timeout_s", [0.02, 0.11, 0.12, 0.2, 0.4])
@in_virtual_time
async def test_a_deadline_ends_all_samples_and_says_how_many_tokens_came(timeout_s: float) -> None:
    async with virtual_cluster(1, 1, sim=CACHING) as cluster:
        heard = await ask(cluster, cluster.request(PROMPT, 200, sampling=DRAWN), 4, timeout_s=timeout_s)
        assert heard.error is not None
        assert heard.error.reason is Reason.DEADLINE_EXCEEDED
        assert heard.error.metadata["emitted_token_count"] == str(sum(map(len, heard.ids.values())))


@in_virtual_time
async def test_samples_count_in_admission_so_that_many_in_one_call_are_many() -> None:
    limits = AdmissionLimits(max_in_flight_count=10, queue_limit=4)
    async with virtual_cluster(1, 2, sim={**CACHING, "max_running_count": 16}, admission=limits) as cluster:
        request = cluster.request(PROMPT, 30, sampling=DRAWN)
        first = asyncio.create_task(ask(cluster, request, 8))
        await asyncio.sleep(0.3)
        assert cluster.admission.in_flight_count == 8
        waiting = asyncio.create_task(ask(cluster, cluster.request(PROMPT, 2, sampling=DRAWN), 4))
        await asyncio.sleep(0.01)
        assert (cluster.admission.in_flight_count, cluster.admission.waiting_count) == (8, 1)
        refused = await ask(cluster, cluster.request(PROMPT, 2, sampling=DRAWN), 2)
        assert refused.error is not None
        assert refused.error.reason is Reason.QUEUE_FULL
        assert_whole(cluster, request, await first, 8)
        assert (await waiting).error is None
        assert cluster.admission.in_flight_count == 0


@in_virtual_time
async def test_more_samples_than_may_be_in_flight_run_when_they_are_alone() -> None:
    limits = AdmissionLimits(max_in_flight_count=2)
    async with virtual_cluster(1, 1, sim=CACHING, admission=limits) as cluster:
        request = cluster.request(PROMPT, 5, sampling=DRAWN)
        assert_whole(cluster, request, await ask(cluster, request, 16), 16)


@in_virtual_time
async def test_room_for_all_samples_is_kept_before_the_first_begins() -> None:
    async with virtual_cluster(1, 1, sim=CACHING) as cluster:
        request = cluster.request(PROMPT, 40, sampling=DRAWN)
        task = asyncio.create_task(ask(cluster, request, 4))
        await asyncio.sleep(0.05)  # prefilling
        (decoder,) = cluster.roster.view().ready(Role.DECODE)
        assert decoder.assigned.decode_count == 4
        assert decoder.assigned.decode_token_count == PROMPT + 4 * 40
        await asyncio.sleep(0.2)  # all decoding
        (decoder,) = cluster.roster.view().ready(Role.DECODE)
        assert decoder.assigned.decode_count == 4
        assert decoder.assigned.decode_token_count == PROMPT + 4 * 40
        assert_whole(cluster, request, await task, 4)


# The prompt's logprobs


async def listen(cluster: VirtualCluster, request: RoutedRequest, *, on_token: Any = None) -> Heard:
    now = asyncio.get_running_loop().time()
    heard = Heard()
    async with aclosing(cluster.relay.run(request, TokenAnswer(), now + 300, received_at=now)) as events:
        async for event in events:
            note(heard, event)
            if on_token is not None and isinstance(event, Piece):
                on_token(heard)
    return heard


def assert_scored(request: RoutedRequest, heard: Heard) -> None:
    assert request.prompt_logprob_count is not None
    told = [each for part in heard.parts for each in part.logprobs]
    ids = [token_id for part in heard.parts for token_id in part.token_ids]
    expected = RULE.prompt_logprobs(request.prompt_token_ids, request.prompt_logprob_count)
    assert tuple(ids) == request.prompt_token_ids
    assert told == [expected[index] for index in range(len(expected))]
    assert told[0] is None
    assert [part.first_token_index for part in heard.parts] == [
        sum(len(part.token_ids) for part in heard.parts[:index]) for index in range(len(heard.parts))
    ]


@pytest.mark.parametrize("mode", ["split", "local"])
@pytest.mark.parametrize("count", [0, 20])
@pytest.mark.parametrize("output", [1, 6])
def test_a_prompts_logprobs_come_whole_and_before_the_first_token(mode: str, count: int, output: int) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(1, 1, sim=CACHING, policy=PlacementPolicy(mode=mode)) as cluster:
            request = cluster.request(500, output, prompt_logprob_count=count, top_logprob_count=1)
            for _ in range(2):  # what is cached is computed again: a prompt is scored whole
                heard = await listen(cluster, request)
                assert heard.ids[0] == cluster.expected(request)
                assert_scored(request, heard)
                assert heard.completed is not None
                assert heard.completed.usage.cached_prompt_token_count == 0
            assert len(heard.parts) == (1 if count == 0 else 3)

    scenario()


@pytest.mark.parametrize("token_count", [1, 4])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@in_virtual_time
async def test_a_lost_worker_does_not_bring_the_prompt_twice(role: Role, token_count: int) -> None:
    async with virtual_cluster(2, 2) as cluster:
        request = cluster.request(200, 9, prompt_logprob_count=3)
        killed: list[str] = []

        def kill(heard: Heard) -> None:
            if not killed and len(heard.ids[0]) >= token_count:
                for process in cluster.processes.values():
                    if process.role is role and any(process.books().values()):
                        killed.append(process.worker_id)
                        process.die()

        heard = await listen(cluster, request, on_token=kill)
        assert heard.ids[0] == cluster.expected(request)
        assert_scored(request, heard)


@in_virtual_time
async def test_the_parts_are_told_once_beside_several_samples() -> None:
    async with virtual_cluster(1, 1, sim=CACHING) as cluster:
        request = cluster.request(300, 6, sampling=DRAWN, prompt_logprob_count=20)
        heard = await ask(cluster, request, 4)
        assert_whole(cluster, request, heard, 4)
        assert_scored(request, heard)


# Cached tokens


@pytest.mark.parametrize("mode", ["split", "local"])
def test_cached_tokens_are_what_the_engine_found(mode: str) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(1, 1, sim=CACHING, policy=PlacementPolicy(mode=mode)) as cluster:
            request = cluster.request(PROMPT, 6)
            found = []
            for _ in range(2):
                heard = await listen(cluster, request)
                assert heard.completed is not None
                found.append(heard.completed.usage.cached_prompt_token_count)
            assert found == [0, (PROMPT - 1) // BLOCK * BLOCK]

    scenario()


@in_virtual_time
async def test_a_retry_does_not_count_as_cached_what_the_first_attempt_computed() -> None:
    async with virtual_cluster(1, 2, sim=CACHING) as cluster:
        request = cluster.request(PROMPT, 9)
        killed: list[str] = []

        def kill(heard: Heard) -> None:
            if not killed and len(heard.ids[0]) >= 3:
                (busy,) = [
                    each
                    for each in cluster.processes.values()
                    if each.role is Role.DECODE and each.engine.load().running_count
                ]
                killed.append(busy.worker_id)
                busy.die()

        heard = await listen(cluster, request, on_token=kill)
        assert killed
        assert heard.ids[0] == cluster.expected(request)
        assert heard.completed is not None
        assert heard.completed.report.attempt_count == 2
        assert heard.completed.usage.cached_prompt_token_count == 0


# Anything at any time


@pytest.mark.parametrize("seed", range(12))
@in_virtual_time
async def test_storms_of_samples_with_deaths_and_cancels_cost_no_token_and_leave_nothing(seed: int) -> None:
    rng = random.Random(seed)  # a reproducible storm
    limits = AdmissionLimits(max_in_flight_count=12)
    async with virtual_cluster(2, 2, sim={**CACHING, "max_running_count": 6}, admission=limits) as cluster:

        async def call() -> None:
            await asyncio.sleep(rng.uniform(0, 1))
            count = rng.randint(2, 6)
            scored = rng.choice([None, 3])
            request = cluster.request(
                rng.randint(1, 200), rng.randint(1, 25), sampling=DRAWN, prompt_logprob_count=scored
            )
            leaves_after_s = rng.choice([None, None, rng.uniform(0, 1)])
            heard = Heard()
            task = asyncio.create_task(ask(cluster, request, count, heard=heard))
            await asyncio.wait([task], timeout=leaves_after_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            expected = cluster.expected(request)
            for ids in heard.ids.values():
                assert ids == expected[: len(ids)]
            if leaves_after_s is None:
                assert_whole(cluster, request, heard, count)
                if scored is not None:
                    assert_scored(request, heard)

        async def misfortune() -> None:
            await asyncio.sleep(rng.uniform(0, 1.5))
            victim = rng.choice(sorted(cluster.processes))
            role = cluster.processes[victim].role
            cluster.processes[victim].die()
            await asyncio.sleep(rng.uniform(0.1, 1))
            await cluster.launch(victim, role)

        await asyncio.gather(*(call() for _ in range(8)), misfortune())
