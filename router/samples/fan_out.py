"""Several answers to one prompt, in one stream: sample 0 goes the ordinary way, the others follow it to its KV.

    sample 0   place .. prefill .. pull .. Adopted ........ tokens ........ Completed
    sample 1                                  '-- same decode worker, prompt from its prefix cache .. Completed
    sample i                                  '-- (seed + i)

Each sample is a flight of its own, with the retry rule of any request; a sample whose worker was lost is computed
elsewhere, the others go on. A sample that fails for good fails the call, and ends the others. Owns the tasks that
read the samples and the one bounded queue between them and the caller; nothing of them is left when the stream is
closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from baton.errors import BatonError, Reason, StatusName, attempts_exhausted, told_of_a_leg
from baton.request import Usage
from baton.timeline import Phase, PhaseDurations
from router.answering import (
    Admitted,
    Completed,
    PhaseReport,
    Piece,
    PromptPart,
    RelayEvent,
    RoutedRequest,
    SampleCompleted,
)
from router.samples.sample_group import SampleGroup, Seat

RunSample = Callable[[RoutedRequest, Seat], AsyncGenerator[RelayEvent, None]]

_EMITTED = "emitted_token_count"
_OURS_TO_TELL = frozenset({Reason.DRAINING, Reason.STALLED, Reason.ATTEMPTS_EXHAUSTED})
"""Reasons that are the same before and after the first token, but for what the caller may do."""


def sample_request(request: RoutedRequest, sample_index: int) -> RoutedRequest:
    """The request of one sample: drawn with ``seed + i``; what is told of the prompt is told once, with sample 0."""
    if sample_index == 0:
        return request
    sampling = request.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed + sample_index)
    return replace(
        request,
        generation_id=f"{request.generation_id}:{sample_index}",
        sampling=sampling,
        prompt_logprob_count=None,
    )


async def fan_out(request: RoutedRequest, group: SampleGroup, run: RunSample) -> AsyncGenerator[RelayEvent, None]:
    """``Admitted PromptPart* Piece* Completed`` of all samples together: each sample's pieces in order, one Completed
    with ``samples``. Consume with ``aclosing``; ``group`` is closed in any case.

    Raises what a sample raises, as said of the whole call: once any token of any sample was passed on, nothing is
    called safe to retry.
    """
    samples = _Samples(request, group, run)
    completed: dict[int, Completed] = {}
    emitted_count = 0
    loop = asyncio.get_running_loop()
    lead_ended_at = 0.0
    try:
        samples.start_lead()
        while len(completed) < group.sample_count:
            index, event = await samples.next()
            match event:
                case BatonError():
                    raise _of_the_call(event, emitted_count)
                case Exception():
                    raise event
                case Piece():
                    emitted_count += event.token_count
                    yield replace(event, sample_index=index)
                case Completed():
                    completed[index] = event
                    if index == 0:
                        lead_ended_at = loop.time()
                case Admitted() | PromptPart() if index == 0:
                    yield event
        yield _together([completed[index] for index in range(group.sample_count)], loop.time() - lead_ended_at)
    finally:
        try:
            await samples.close()
        finally:
            group.close()


class _Samples:
    """The readers of the samples' streams. One reads sample 0; the others start when it says where its KV is."""

    def __init__(self, request: RoutedRequest, group: SampleGroup, run: RunSample) -> None:
        self._request = request
        self._count = group.sample_count
        self._group = group
        self._run = run
        # One event for each sample: what piles up behind it piles up in the sample's own outbox, where it is merged.
        self._events: asyncio.Queue[tuple[int, RelayEvent | Exception]] = asyncio.Queue(maxsize=self._count)
        self._tasks: list[asyncio.Task[None]] = []
        self._lead_began = asyncio.Event()
        self._is_closed = False

    def start_lead(self) -> None:
        self._start(Seat(self._group, 0, on_adopted=self._start_others))

    async def next(self) -> tuple[int, RelayEvent | Exception]:
        return await self._events.get()

    async def close(self) -> None:
        """Ends all of them and waits until nothing of them is left. Idempotent."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            # Shielded: cancelled meanwhile, they still end by themselves.
            await asyncio.shield(asyncio.gather(*self._tasks, return_exceptions=True))

    def _start_others(self, worker_id: str) -> None:
        if len(self._tasks) == 1 and not self._is_closed:
            for index in range(1, self._count):
                self._start(Seat(self._group, index, near=worker_id))

    def _start(self, seat: Seat) -> None:
        name = f"{self._request.generation_id} sample {seat.sample_index}"
        self._tasks.append(asyncio.create_task(self._read(seat), name=name))

    async def _read(self, seat: Seat) -> None:
        index = seat.sample_index
        try:
            async with aclosing(self._run(sample_request(self._request, index), seat)) as events:
                async for event in events:
                    if isinstance(event, Completed) and seat.is_lead:
                        # It needed no decode: the prefill worker has the prompt.
                        self._start_others(event.report.prefill_worker_id)
                    if not seat.is_lead:
                        await self._lead_began.wait()  # the prompt's parts go before anybody's tokens
                    await self._events.put((index, event))
                    if seat.is_lead and isinstance(event, Piece | Completed):
                        self._lead_began.set()
        except Exception as error:
            await self._events.put((index, error))


def _together(completed: list[Completed], since_lead_s: float) -> Completed:
    lead = completed[0]
    usage = Usage(
        prompt_token_count=lead.usage.prompt_token_count,
        output_token_count=sum(each.usage.output_token_count for each in completed),
        cached_prompt_token_count=lead.usage.cached_prompt_token_count,
    )
    samples = tuple(
        SampleCompleted(
            sample_index=index,
            reason=each.reason,
            matched_stop_sequence=each.matched_stop_sequence,
            matched_stop_token_id=each.matched_stop_token_id,
            output_token_count=each.usage.output_token_count,
            cumulative_logprob=each.cumulative_logprob,
            tool_calls=each.tool_calls,
        )
        for index, each in enumerate(completed)
    )
    return replace(lead, usage=usage, samples=samples, report=_until_the_last(lead.report, since_lead_s))


def _until_the_last(report: PhaseReport, since_lead_s: float) -> PhaseReport:
    """Sample 0's phases; the time that the others went on is decode, so that the sum is the call's time."""
    durations = report.durations
    seconds = {**durations.seconds, Phase.DECODE: durations[Phase.DECODE] + since_lead_s}
    total_s = durations.total_s + since_lead_s
    return replace(report, durations=PhaseDurations(seconds, total_s, durations.time_to_first_token_s))


def _of_the_call(error: BatonError, emitted_count: int) -> BatonError:
    """A sample's failure as the failure of the call, whose caller has ``emitted_count`` tokens of all samples."""
    if emitted_count == 0:
        return error
    if error.is_retryable and error.reason not in _OURS_TO_TELL:
        return attempts_exhausted(1, emitted_count, Phase.QUEUE.value, told_of_a_leg(error))
    if not error.is_retryable and _EMITTED not in error.metadata:
        return error
    return BatonError(
        error.reason,
        StatusName.ABORTED if error.is_retryable else error.status,
        error.message,
        metadata={**error.metadata, _EMITTED: str(emitted_count)},
        violations=error.violations,
    )
