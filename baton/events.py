"""What a caller gets: the events of a stream, and the answer that they add up to.

Values only; no protobuf and no I/O. A stream is ``Started PromptPart* Chunk* Finished``.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from baton.errors import internal
from baton.request import ChatMessage, FinishReason, Handover, PlacementMode, ToolCall, ToolCallDelta, Usage
from baton.timeline import Phase
from baton.transfer_report import TransferReport


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted."""

    generation_id: str
    model: str
    prompt_token_count: int
    resume_token: str = field(default="", repr=False)
    """A secret of the caller. Empty: not resumable. The client resumes by itself and needs nobody to keep it."""
    resume_grace_s: float | None = None
    """How long the generation waits without a reader. None: not resumable."""
    time_allowed_s: float | None = None
    """The caller's timeout, cut to the server's maximum. None: an older server."""

    @property
    def text(self) -> str:
        """Empty: a loop that only prints what comes needs to tell no events apart."""
        return ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely one token was in the model's own distribution, before temperature, penalties, biases and
    lists of tokens; under a structure, among the tokens that it allows. Natural logarithms."""

    token_id: int
    logprob: float
    rank: int
    """1 is the likeliest. 0: the prompt's very first token, which has nothing before it."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), likeliest first: as many as were asked for."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A part of the prompt as the model read it, if it was asked for."""

    first_token_index: int
    text: str = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    token_count: int
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the answer. ``token_ids`` only if asked for; ``token_count`` always."""

    first_token_index: int
    text: str = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    token_count: int
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    """One of each token if asked for; otherwise empty."""
    sample_index: int = 0
    """Which of several samples; ``first_token_index`` counts within it."""
    reasoning_text: str = field(default="", repr=False)
    """Thinking of a reasoning model."""
    tool_call_deltas: tuple[ToolCallDelta, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class PhaseTimings:
    """Where the time went, seconds. The phases sum to the server's time from receipt to last message."""

    seconds: dict[Phase, float]
    time_to_first_token_s: float | None
    transfer: TransferReport
    handover: Handover | None
    """None: a way this client does not know."""
    prefill_worker_id: str
    decode_worker_id: str
    attempt_count: int
    placement_mode: PlacementMode | None
    """None: a mode this client does not know."""
    placement_reason: str

    def __getitem__(self, phase: Phase) -> float:
        return self.seconds[phase]

    @property
    def total_s(self) -> float:
        return math.fsum(self.seconds.values())

    @property
    def kv_transfer_bytes(self) -> int:
        return self.transfer.kv_bytes

    @property
    def recomputed_token_count(self) -> int:
        return self.transfer.recomputed_token_count


@dataclass(frozen=True, slots=True)
class SampleResult:
    """How one of several samples ended."""

    sample_index: int
    reason: FinishReason | None
    """None: a reason this client does not know."""
    matched_stop_sequence: str | None = field(repr=False)
    matched_stop_token_id: int | None
    output_token_count: int
    cumulative_logprob: float | None = None
    tool_calls: tuple[ToolCall, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete."""

    reason: FinishReason | None
    """None: a reason this client does not know."""
    matched_stop_sequence: str | None = field(repr=False)
    matched_stop_token_id: int | None
    usage: Usage
    phases: PhaseTimings
    cumulative_logprob: float | None = None
    """Of all tokens of the answer, if logprobs were asked for."""
    tool_calls: tuple[ToolCall, ...] = field(default=(), repr=False)
    """Whole; of sample 0."""
    samples: tuple[SampleResult, ...] = ()
    """Of each sample, where several were asked for; what is above is then sample 0's, but usage counts all."""
    resume_count: int = 0
    """How often the client attached again, unseen, after the connection was cut."""

    @property
    def text(self) -> str:
        """Empty, as of ``Started``."""
        return ""


Event = Started | PromptPart | Chunk | Finished


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """One whole answer."""

    text: str = field(repr=False)
    reasoning_text: str = field(repr=False)
    tool_calls: tuple[ToolCall, ...] = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    """Empty unless asked for."""
    token_count: int
    logprobs: tuple[TokenLogprob, ...] = field(repr=False)
    reason: FinishReason | None
    matched_stop_sequence: str | None = field(repr=False)

    def message(self) -> ChatMessage:
        """As the next message of the conversation."""
        return ChatMessage("assistant", self.text, tool_calls=self.tool_calls, reasoning=self.reasoning_text)


@dataclass(frozen=True, slots=True)
class Answer:
    """A stream, read to its end. What has no index is of sample 0."""

    started: Started
    finished: Finished
    samples: tuple[SampleAnswer, ...]
    """At least one, in order."""
    prompt_text: str = field(default="", repr=False)
    """As the model read it, if it was asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def reasoning_text(self) -> str:
        return self.samples[0].reasoning_text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.samples[0].tool_calls

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids

    @property
    def reason(self) -> FinishReason | None:
        return self.finished.reason

    @property
    def usage(self) -> Usage:
        return self.finished.usage

    @property
    def phases(self) -> PhaseTimings:
        return self.finished.phases

    @property
    def resume_count(self) -> int:
        return self.finished.resume_count

    def message(self) -> ChatMessage:
        """As the next message of the conversation."""
        return self.samples[0].message()


class AnswerBuilder:
    """Puts events together. Bounded by the answer, which the context bounds."""

    def __init__(self) -> None:
        self._started: Started | None = None
        self._finished: Finished | None = None
        self._prompt: list[PromptPart] = []
        self._chunks: dict[int, list[Chunk]] = {}

    def add(self, event: Event) -> None:
        match event:
            case Started():
                self._started = event
            case PromptPart():
                self._prompt.append(event)
            case Chunk():
                self._chunks.setdefault(event.sample_index, []).append(event)
            case Finished():
                self._finished = event

    def answer(self) -> Answer:
        """Raises INTERNAL for a stream that was not read to its end."""
        started, finished = self._started, self._finished
        if started is None or finished is None:
            raise internal("a stream without beginning or end is no answer")
        results = finished.samples or (
            SampleResult(
                0,
                finished.reason,
                finished.matched_stop_sequence,
                finished.matched_stop_token_id,
                finished.usage.output_token_count,
                finished.cumulative_logprob,
                finished.tool_calls,
            ),
        )
        return Answer(
            started,
            finished,
            tuple(_sample(self._chunks.get(result.sample_index, ()), result) for result in results),
            "".join(part.text for part in self._prompt),
            tuple(each for part in self._prompt for each in part.logprobs),
        )


def _sample(chunks: Iterable[Chunk], result: SampleResult) -> SampleAnswer:
    chunks = tuple(chunks)
    return SampleAnswer(
        text="".join(chunk.text for chunk in chunks),
        reasoning_text="".join(chunk.reasoning_text for chunk in chunks),
        tool_calls=result.tool_calls,
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        token_count=result.output_token_count,
        logprobs=tuple(each for chunk in chunks for each in chunk.logprobs),
        reason=result.reason,
        matched_stop_sequence=result.matched_stop_sequence,
    )


async def collect(stream: AsyncIterator[Event]) -> Answer:
    """Reads a stream to its end. Raises what the stream raises."""
    builder = AnswerBuilder()
    async for event in stream:
        builder.add(event)
    return builder.answer()


def collect_sync(stream: Iterable[Event]) -> Answer:
    """``collect`` for a stream of ``BatonClientSync``."""
    builder = AnswerBuilder()
    for event in stream:
        builder.add(event)
    return builder.answer()
