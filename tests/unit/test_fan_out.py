"""Several samples in one stream: order, sums, errors, and that nothing is left of any of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

import pytest

from baton.errors import BatonError, Reason, StatusName, deadline_exceeded, draining, invalid_request, no_worker
from baton.errors import FieldViolation as Violation
from baton.request import FinishReason, Handover, PlacementMode, Sampling, Usage
from baton.testing import in_virtual_time
from baton.timeline import PHASES, Phase, PhaseDurations
from baton.transfer_report import TransferReport
from router.answering import (
    Admitted,
    Completed,
    PhaseReport,
    Piece,
    PromptPart,
    RelayEvent,
    RoutedRequest,
)
from router.samples.fan_out import fan_out, sample_request
from router.samples.sample_group import SampleGroup, Seat

REQUEST = RoutedRequest(
    "gen-1", (1, 2, 3), 8, sampling=Sampling(temperature=1.0, seed=40), prompt_logprob_count=2, top_logprob_count=0
)
TOKEN_S = 0.5
Script = Callable[[RoutedRequest, Seat], AsyncGenerator[RelayEvent, None]]


def completed(count: int, cached: int = 0, total_s: float = 1.0) -> Completed:
    durations = PhaseDurations(dict.fromkeys(PHASES, 0.0) | {Phase.DECODE: total_s}, total_s, 0.1)
    report = PhaseReport(
        *(durations, TransferReport(), Handover.NONE, "p0", "d0", 1, PlacementMode.SPLIT, "split"),
    )
    usage = Usage(3, count, cached)
    return Completed(FinishReason.MAX_OUTPUT_TOKENS, None, None, usage, report, cumulative_logprob=-1.0 * count)


class Samples:
    """Scripted samples: what runs, and what was asked of each."""

    def __init__(self, sample_count: int) -> None:
        self.asked: dict[int, tuple[RoutedRequest, Seat]] = {}
        self.open_count = 0
        self.given_back: list[int] = []
        self.group = SampleGroup(sample_count, self.given_back.append)
        self.fails: dict[int, BatonError] = {}
        self.token_count = 3
        self.part_count = 2
        self.adopts = True
        self.adopts_early = False
        """While the prompt's parts still wait for a reader: the engines do not."""

    async def run(self, request: RoutedRequest, seat: Seat) -> AsyncGenerator[RelayEvent, None]:
        index = seat.sample_index
        self.asked[index] = request, seat
        self.group.count()
        self.open_count += 1
        try:
            yield Admitted(request.generation_id)
            if self.adopts and self.adopts_early:
                seat.on_adopted("d0")
            if request.prompt_logprob_count is not None:
                for part in range(self.part_count):
                    yield PromptPart(part, (part,), logprobs=(None,))
            if self.adopts:
                seat.on_adopted("d0")
            for at in range(self.token_count + index):
                if index in self.fails and at == 1:
                    raise self.fails[index]
                yield Piece(at, (100 * index + at,), f"{index}", None)
                await asyncio.sleep(TOKEN_S)
            yield completed(self.token_count + index, cached=16 * index)
        finally:
            self.open_count -= 1

    def stream(self) -> AsyncGenerator[RelayEvent, None]:
        return fan_out(REQUEST, self.group, self.run)

    def assert_nothing_left(self) -> None:
        assert self.open_count == 0
        assert self.given_back == [self.group.sample_count]
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not [name for name in names if "sample" in name]


async def read(samples: Samples, got: list[RelayEvent] | None = None) -> list[RelayEvent]:
    got = [] if got is None else got
    async with aclosing(samples.stream()) as events:
        async for event in events:
            got.append(event)
    return got


@in_virtual_time
async def test_the_samples_share_one_stream_with_one_beginning_and_one_end() -> None:
    samples = Samples(4)
    events = await read(samples)
    assert [type(event) for event in events[:3]] == [Admitted, PromptPart, PromptPart]
    assert [type(event) for event in events].count(Admitted) == 1
    assert [type(event) for event in events].count(Completed) == 1
    for index in range(4):
        pieces = [event for event in events if isinstance(event, Piece) and event.sample_index == index]
        assert [each.first_token_index for each in pieces] == list(range(3 + index))
        assert [each.token_ids[0] for each in pieces] == [100 * index + at for at in range(3 + index)]
    samples.assert_nothing_left()


@in_virtual_time
async def test_each_sample_is_drawn_with_its_own_seed_and_runs_near_the_first() -> None:
    samples = Samples(3)
    await read(samples)
    assert {index: request.sampling.seed for index, (request, _) in samples.asked.items()} == {0: 40, 1: 41, 2: 42}
    assert {index: seat.near for index, (_, seat) in samples.asked.items()} == {0: "", 1: "d0", 2: "d0"}
    ids = [request.generation_id for request, _ in samples.asked.values()]
    assert ids == ["gen-1", "gen-1:1", "gen-1:2"]
    assert [request.prompt_logprob_count for request, _ in samples.asked.values()] == [2, None, None]


def test_without_a_seed_no_sample_gets_one() -> None:
    request = replace(REQUEST, sampling=Sampling(temperature=1.0))
    assert sample_request(request, 5).sampling.seed is None


@in_virtual_time
async def test_outputs_are_summed_the_prompt_counts_once_and_its_cached_tokens_are_sample_0s() -> None:
    samples = Samples(3)
    last = (await read(samples))[-1]
    assert isinstance(last, Completed)
    assert last.usage == Usage(3, 3 + 4 + 5, 0)
    assert [(each.sample_index, each.output_token_count) for each in last.samples] == [(0, 3), (1, 4), (2, 5)]
    assert [each.cumulative_logprob for each in last.samples] == [-3.0, -4.0, -5.0]
    assert last.cumulative_logprob == -3.0
    # Sample 2 ends after five tokens, sample 0 after three: the rest is decode.
    durations = last.report.durations
    assert durations[Phase.DECODE] == pytest.approx(1.0 + 2 * TOKEN_S)
    assert durations.total_s == pytest.approx(sum(durations.seconds.values()))


@in_virtual_time
async def test_the_others_start_near_the_prefill_worker_where_the_first_needed_no_decode() -> None:
    samples = Samples(3)
    samples.adopts = False
    last = (await read(samples))[-1]
    assert isinstance(last, Completed)
    assert len(last.samples) == 3
    assert [seat.near for _, seat in samples.asked.values()] == ["", "p0", "p0"]
    samples.assert_nothing_left()


@in_virtual_time
async def test_the_prompts_parts_come_before_anybodys_tokens_however_slow_their_reader() -> None:
    samples = Samples(4)
    samples.part_count, samples.adopts_early = 40, True
    got: list[RelayEvent] = []
    async with aclosing(samples.stream()) as events:
        async for event in events:
            got.append(event)
            await asyncio.sleep(TOKEN_S)
    assert [type(event) for event in got[:42]] == [Admitted, *[PromptPart] * 40, Piece]


@in_virtual_time
async def test_a_reader_that_stalls_stops_the_streams_and_loses_nothing() -> None:
    samples = Samples(8)
    async with aclosing(samples.stream()) as events:
        got = [await anext(events)]
        await asyncio.sleep(1000)
        assert samples.open_count > 0  # held up, each with its outbox behind it
        got += [event async for event in events]
    assert sum(event.token_count for event in got if isinstance(event, Piece)) == sum(3 + index for index in range(8))
    samples.assert_nothing_left()


@pytest.mark.parametrize("taken_count", range(12))
@in_virtual_time
async def test_closing_the_stream_anywhere_ends_every_sample(taken_count: int) -> None:
    samples = Samples(4)
    async with aclosing(samples.stream()) as events:
        for _ in range(taken_count):
            await anext(events)
    if taken_count:
        samples.assert_nothing_left()


@pytest.mark.parametrize("after_s", [0.0, 0.2, 0.5, 0.9, 1.4, 1.5])
@in_virtual_time
async def test_cancelling_the_reader_at_any_time_ends_every_sample(after_s: float) -> None:
    samples = Samples(4)
    task = asyncio.create_task(read(samples))
    await asyncio.sleep(after_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if samples.asked:
        samples.assert_nothing_left()


@pytest.mark.parametrize(
    ("error", "reason", "status"),
    [
        (no_worker("decode", 0), Reason.ATTEMPTS_EXHAUSTED, StatusName.ABORTED),
        (draining(), Reason.DRAINING, StatusName.ABORTED),
        (deadline_exceeded("decode", 1), Reason.DEADLINE_EXCEEDED, StatusName.DEADLINE_EXCEEDED),
    ],
)
@in_virtual_time
async def test_a_sample_that_fails_fails_the_call_and_nothing_is_called_safe_to_retry(
    error: BatonError, reason: Reason, status: StatusName
) -> None:
    samples = Samples(3)
    samples.fails[2] = error
    got: list[RelayEvent] = []
    with pytest.raises(BatonError) as caught:
        await read(samples, got)
    emitted = sum(event.token_count for event in got if isinstance(event, Piece))
    assert emitted > 1
    assert (caught.value.reason, caught.value.status) == (reason, status)
    assert caught.value.metadata["emitted_token_count"] == str(emitted)
    samples.assert_nothing_left()


@in_virtual_time
async def test_what_a_worker_says_against_the_request_is_passed_on_as_it_is() -> None:
    samples = Samples(2)
    samples.fails[1] = invalid_request([Violation("sampling.structure", "is not one that the engine can follow")])
    with pytest.raises(BatonError) as caught:
        await read(samples)
    assert caught.value is samples.fails[1]
    samples.assert_nothing_left()


def test_a_group_counts_its_places_once_and_gives_shares_as_samples_start() -> None:
    class Lead:
        decode_worker_id = "d0"
        given = 0

        def give_share(self) -> None:
            self.given += 1

    given_back: list[int] = []
    group = SampleGroup(3, given_back.append)
    assert (group.count(), group.count()) == (3, 0)
    lead = group.lead = Lead()
    assert group.kept_count == 3
    assert group.keeps_room_on("d0", 1)
    assert not group.keeps_room_on("d1", 1)
    group.started(1)
    group.started(1)
    assert (lead.given, group.kept_count) == (1, 2)
    assert not group.keeps_room_on("d0", 1)
    group.close()
    group.close()
    assert given_back == [3]
