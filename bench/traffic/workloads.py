"""The workloads: what kind of requests come, each with its parameters and defaults. Pure.

A pacer says when something arrives; a workload says what that is: a request, or the first request of a session whose
further turns each follow the one before. All lengths go by one factor, ``scale``, so that a small model on a slow
machine can run the same shape. Everything is drawn by name from the seed: the same arguments give the same plan, and
a longer run begins with the shorter one (as far as its pacer does: a ramp is another ramp when it is longer).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from bench.traffic.draft import Draft
from bench.traffic.lengths import Fixed, Lengths, LogNormal, Uniform, parse_lengths
from bench.traffic.pacers import Pacer
from bench.traffic.plan import Plan
from bench.traffic.prompts import PromptMaker


def _parameter(default: Any, what: str) -> Any:
    return dataclasses.field(default=default, metadata={"what": what})


def _exponential(rng: random.Random, mean_s: float) -> float:
    return -math.log(1.0 - rng.random()) * mean_s


def _check_counts(workload: object, *names: str) -> None:
    for name in names:
        if getattr(workload, name) < 1:
            raise ValueError(f"{name} is below 1")


def _check_not_negative(workload: object, *names: str) -> None:
    for name in names:
        value = getattr(workload, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is not 0 or more")


def _check_shares(workload: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(workload, name) <= 1:
            raise ValueError(f"{name} is not within 0 and 1")


class Workload(Protocol):
    """A kind of traffic. Its fields are its parameters."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    arrivals: ClassVar[str]
    """What one arrival of the pacer is: "requests", "sessions"..."""

    def fill(self, draft: Draft, times_s: list[float], duration_s: float) -> None:
        """Adds its requests to the draft."""
        ...


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Short questions under a system prompt, answered at length; with more turns, a conversation that grows."""

    arrivals: ClassVar = "sessions of one or more turns"
    system_prompt_token_count: int = _parameter(100, "shared by all sessions of one system prompt")
    system_prompt_count: int = _parameter(1, "different system prompts, each as likely")
    message_tokens: Lengths = _parameter(LogNormal(80, 1.0, high=2000), "of each user message")
    answer_tokens: Lengths = _parameter(LogNormal(150, 0.8, high=1000), "of each answer")
    turns: Lengths = _parameter(Fixed(1), "turns of a session; not scaled")
    pause_mean_s: float = _parameter(5.0, "mean of the exponential pause between an answer and the next message")

    def __post_init__(self) -> None:
        _check_counts(self, "system_prompt_count")
        _check_not_negative(self, "system_prompt_token_count", "pause_mean_s")

    def fill(self, draft: Draft, times_s: list[float], duration_s: float) -> None:
        for number, at_s in enumerate(times_s):
            rng = draft.rng("chat", number)
            system = int(rng.random() * self.system_prompt_count)
            prompt = draft.shared(("system", system), draft.scaled(self.system_prompt_token_count))
            turn_count = self.turns.draw(rng)
            for turn in range(turn_count):
                message_count = self.message_tokens.draw(rng, draft.scale)
                output_count = self.answer_tokens.draw(rng, draft.scale)
                pause_s = _exponential(rng, self.pause_mean_s)
                prompt += draft.unique(("chat", number, turn, "message"), message_count)
                if turn == 0:
                    session_id = draft.session_id("chat", number) if turn_count > 1 else ""
                    draft.start(at_s, prompt, output_count, session_id=session_id)
                elif draft.fits(len(prompt), output_count):
                    draft.follow(pause_s, prompt, output_count)
                else:
                    draft.notes["sessions_ended_by_context"] += 1
                    break
                # A stand-in of the answer's length: what the model really says is not known when a plan is made.
                prompt += draft.unique(("chat", number, turn, "answer"), output_count)


@dataclass(frozen=True, kw_only=True)
class Rag:
    """Questions about long documents that others ask about, too: popularity of documents is a Zipf law."""

    arrivals: ClassVar = "requests"
    system_prompt_token_count: int = _parameter(60, "shared by all")
    document_count: int = _parameter(100, "different documents")
    document_tokens: Lengths = _parameter(LogNormal(2000, 0.5, high=6000), "of a document, always the same for it")
    zipf_exponent: float = _parameter(
        1.0, "the k-th most popular document is asked for k^-exponent as often; 0: evenly"
    )
    question_tokens: Lengths = _parameter(LogNormal(30, 0.6, high=300), "unique, after the document")
    answer_tokens: Lengths = _parameter(LogNormal(150, 0.6, high=800), "of the answer")

    def __post_init__(self) -> None:
        _check_counts(self, "document_count")
        _check_not_negative(self, "system_prompt_token_count", "zipf_exponent")

    def fill(self, draft: Draft, times_s: list[float], duration_s: float) -> None:
        popularity = list(itertools.accumulate((k + 1) ** -self.zipf_exponent for k in range(self.document_count)))
        for number, at_s in enumerate(times_s):
            rng = draft.rng("rag", number)
            document = min(bisect.bisect(popularity, rng.random() * popularity[-1]), self.document_count - 1)
            length = self.document_tokens.draw(draft.rng("document", document), draft.scale)
            question_count = self.question_tokens.draw(rng, draft.scale)
            output_count = self.answer_tokens.draw(rng, draft.scale)
            prompt = (
                *draft.shared(("system",), draft.scaled(self.system_prompt_token_count)),
                *draft.shared(("document", document), length),
                *draft.unique(("rag", number), question_count),
            )
            draft.start(at_s, prompt, output_count)


@dataclass(frozen=True, kw_only=True)
class Agent:
    """Sessions of a tool-using agent: each prompt is the one before, its answer, and what the tool returned."""

    arrivals: ClassVar = "sessions of several turns"
    system_prompt_token_count: int = _parameter(1200, "instructions and tools, shared by all sessions")
    task_tokens: Lengths = _parameter(LogNormal(150, 0.8, high=2000), "what a session is about")
    turns: Lengths = _parameter(Uniform(3, 8), "requests of a session; not scaled")
    answer_tokens: Lengths = _parameter(LogNormal(80, 0.7, high=600), "of each answer (a call of a tool)")
    result_tokens: Lengths = _parameter(LogNormal(250, 1.0, high=3000), "of each result of a tool")
    pause_mean_s: float = _parameter(1.0, "mean of the exponential time that a tool takes")

    def __post_init__(self) -> None:
        _check_not_negative(self, "system_prompt_token_count", "pause_mean_s")

    def fill(self, draft: Draft, times_s: list[float], duration_s: float) -> None:
        for number, at_s in enumerate(times_s):
            rng = draft.rng("agent", number)
            prompt = draft.shared(("system",), draft.scaled(self.system_prompt_token_count))
            prompt += draft.unique(("agent", number, "task"), self.task_tokens.draw(rng, draft.scale))
            for turn in range(self.turns.draw(rng)):
                output_count = self.answer_tokens.draw(rng, draft.scale)
                result_count = self.result_tokens.draw(rng, draft.scale)
                pause_s = _exponential(rng, self.pause_mean_s)
                if turn == 0:
                    draft.start(at_s, prompt, output_count, session_id=draft.session_id("agent", number))
                elif draft.fits(len(prompt), output_count):
                    draft.follow(pause_s, prompt, output_count)
                else:
                    draft.notes["sessions_ended_by_context"] += 1
                    break
                # The answer is a stand-in of the real one's length, so its KV is computed and not found.
                prompt += draft.unique(("agent", number, turn, "answer"), output_count)
                prompt += draft.unique(("agent", number, turn, "result"), result_count)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A long prompt, part of it shared with others, and an answer: code completion, summaries, long answers."""

    arrivals: ClassVar = "requests"
    prompt_tokens: Lengths = _parameter(LogNormal(1500, 0.96, high=7500), "of the prompt, shared part included")
    answer_tokens: Lengths = _parameter(LogNormal(15, 1.1, high=300), "of the answer")
    shared_share: float = _parameter(
        0.0, "leading part of each prompt that is one of `prefix_count` prefixes, 0 to 1"
    )
    prefix_count: int = _parameter(20, "different shared prefixes, each as likely")

    def __post_init__(self) -> None:
        _check_counts(self, "prefix_count")
        _check_shares(self, "shared_share")

    def fill(self, draft: Draft, times_s: list[float], duration_s: float) -> None:
        for number, at_s in enumerate(times_s):
            rng = draft.rng("completion", number)
            prompt_count = self.prompt_tokens.draw(rng, draft.scale)
            output_count = self.answer_tokens.draw(rng, draft.scale)
            prefix = int(rng.random() * self.prefix_count)
            shared_count = math.floor(prompt_count * self.shared_share)
            prompt = draft.shared(("prefix", prefix), shared_count)
            prompt += draft.unique(("completion", number), prompt_count - shared_count)
            draft.start(at_s, prompt, output_count)


@dataclass(frozen=True, kw_only=True)
class ChatBursts:
    """Streams of chat, while long prompts arrive in bursts: do the long ones hold up the streams' tokens?"""

    arrivals: ClassVar = "streams of chat; bursts come by their own parameters"
    stream_prompt_tokens: Lengths = _parameter(Fixed(64), "of a stream")
    stream_answer_tokens: Lengths = _parameter(Fixed(150), "of a stream")
    burst_prompt_tokens: Lengths = _parameter(Fixed(2000), "of a long prompt")
    burst_answer_tokens: Lengths = _parameter(Fixed(4), "of a long prompt's answer")
    burst_size: int = _parameter(4, "long prompts of a burst")
    burst_spacing_s: float = _parameter(0.1, "between those of a burst; 0: at once")
    burst_every_s: float = _parameter(10.0, "from the begin of one burst to the next")
    burst_first_s: float = _parameter(2.0, "begin of the first burst")

    def __post_init__(self) -> None:
        _check_counts(self, "burst_size")
        _check_not_negative(self, "burst_spacing_s", "burst_first_s")
        if self.burst_every_s <= 0:
            raise ValueError("burst_every_s is not above 0")

    def fill(self, draft: Draft, times_s: list[float], duration_s: float) -> None:
        for number, at_s in enumerate(times_s):
            rng = draft.rng("stream", number)
            prompt = draft.unique(("stream", number), self.stream_prompt_tokens.draw(rng, draft.scale))
            draft.start(at_s, prompt, self.stream_answer_tokens.draw(rng, draft.scale), group="stream")
        for burst in itertools.count():
            begin_s = self.burst_first_s + burst * self.burst_every_s
            if begin_s >= duration_s:
                break
            for place in range(self.burst_size):
                at_s = begin_s + place * self.burst_spacing_s
                if at_s >= duration_s:
                    break
                rng = draft.rng("arrival", burst, place)
                prompt = draft.unique(("arrival", burst, place), self.burst_prompt_tokens.draw(rng, draft.scale))
                draft.start(at_s, prompt, self.burst_answer_tokens.draw(rng, draft.scale), group="arrival")


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """Everything that is awkward at once. Each arrival is of one kind, which is its group; what no share takes is
    "ordinary".
    """

    arrivals: ClassVar = "requests; some arrivals are bursts of several at one instant"
    tiny_share: float = _parameter(0.2, "prompts of 1 to 4 tokens, not scaled, that want one token")
    long_share: float = _parameter(0.1, "prompts near the end of the context")
    endless_share: float = _parameter(0.05, "short prompts with very long answers")
    cancelled_share: float = _parameter(0.15, "callers that leave, some of them before the first token")
    identical_share: float = _parameter(0.2, "the same prompt again and again")
    prompt_tokens: Lengths = _parameter(LogNormal(200, 0.8, high=2000), "of ordinary, cancelled and identical ones")
    answer_tokens: Lengths = _parameter(LogNormal(60, 0.7, high=400), "of all but tiny, long and endless ones")
    long_prompt_tokens: Lengths = _parameter(Uniform(4000, 8000), "of long ones; cut to the context")
    endless_answer_tokens: Lengths = _parameter(Uniform(1000, 2000), "of endless ones")
    cancel_mean_s: float = _parameter(1.0, "mean of the exponential time after which a caller leaves")
    priority_spread: int = _parameter(1, "priorities are drawn evenly from minus this to this")
    burst_share: float = _parameter(0.03, "arrivals that are a burst")
    burst_size: int = _parameter(8, "requests of a burst")

    def __post_init__(self) -> None:
        shares = ("tiny_share", "long_share", "endless_share", "cancelled_share", "identical_share")
        _check_shares(self, *shares, "burst_share")
        if sum(getattr(self, share) for share in shares) > 1 + 1e-9:
            raise ValueError("shares of the kinds sum to more than 1")
        _check_counts(self, "burst_size")
        _check_not_negative(self, "priority_spread", "cancel_mean_s")

    def fill(self, draft: Draft, times_s: list[float], duration_s: float) -> None:
        for number, at_s in enumerate(times_s):
            rng = draft.rng("adversarial", number)
            for place in range(self.burst_size if rng.random() < self.burst_share else 1):
                self._add(draft, draft.rng("adversarial", number, place), at_s, (number, place))

    def _add(self, draft: Draft, rng: random.Random, at_s: float, name: tuple[int, int]) -> None:
        group = self._kind(rng.random())
        prompt_lengths = self.long_prompt_tokens if group == "long" else self.prompt_tokens
        prompt_count = prompt_lengths.draw(rng, draft.scale)
        output_lengths = self.endless_answer_tokens if group == "endless" else self.answer_tokens
        output_count = output_lengths.draw(rng, draft.scale)
        priority = int(rng.random() * (2 * self.priority_spread + 1)) - self.priority_spread
        cancel_after_s = _exponential(rng, self.cancel_mean_s) if group == "cancelled" else None
        if group == "tiny":
            prompt_count, output_count = 1 + int(rng.random() * 4), 1
        if group == "long":
            output_count = 1
        if group == "identical":
            first = draft.rng("identical")
            prompt_count = self.prompt_tokens.draw(first, draft.scale)
            prompt = draft.shared(("identical",), prompt_count)
        else:
            prompt = draft.unique(("adversarial", *name), prompt_count)
        draft.start(at_s, prompt, output_count, group=group, priority=priority, cancel_after_s=cancel_after_s)

    def _kind(self, at: float) -> str:
        for kind, share in (
            ("tiny", self.tiny_share),
            ("long", self.long_share),
            ("endless", self.endless_share),
            ("cancelled", self.cancelled_share),
            ("identical", self.identical_share),
        ):
            if at < share:
                return kind
            at -= share
        return "ordinary"


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "chat": Chat(),
        "chat-sessions": Chat(turns=Uniform(2, 6)),
        "chat-bursts": ChatBursts(),
        "rag": Rag(),
        "agent": Agent(),
        "code": Completion(shared_share=0.3),
        "summarisation": Completion(
            prompt_tokens=LogNormal(2700, 0.25, high=4000), answer_tokens=LogNormal(170, 0.8, high=1000)
        ),
        "long-output": Completion(
            prompt_tokens=LogNormal(300, 0.2, high=1200), answer_tokens=LogNormal(1100, 0.3, high=3500)
        ),
        "random": Completion(prompt_tokens=Fixed(512), answer_tokens=Fixed(128)),
        "adversarial": Adversarial(),
    }
)
"""Each with its defaults. ``dataclasses.fields`` of a value: its parameters; ``metadata["what"]``: what each is."""


def make_plan(
    name: str,
    *,
    pacer: Pacer,
    duration_s: float | None = None,
    seed: int,
    prompts: PromptMaker,
    scale: float = 1.0,
    context_token_count: int = 8192,
    arrival_limit: int | None = None,
    parameters: Mapping[str, object] = MappingProxyType({}),
) -> Plan:
    """A plan of the workload ``name``.

    ``duration_s``: of the arrivals; without it, the pacer's own. ``scale``: factor of all lengths in tokens.
    ``context_token_count``: prompt and answer together never have more; what is cut is counted in the facts.
    ``arrival_limit``: only so many of the pacer's arrivals. ``parameters``: in place of the workload's defaults, as
    values or as spelled on a command line. Raises ``ValueError`` for whatever does not fit.
    """
    workload = with_parameters(name, parameters)
    duration_s = pacer.natural_duration_s if duration_s is None else duration_s
    if duration_s is None:
        raise ValueError("a duration is needed: this pacer goes on for ever")
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"duration {duration_s:g} s is not above 0")
    draft = Draft(seed=seed, prompts=prompts, scale=scale, context_token_count=context_token_count)
    times_s = pacer.times_s(duration_s, draft.rng("pacer"))[:arrival_limit]
    workload.fill(draft, times_s, duration_s)
    return draft.plan(
        name,
        duration_s,
        {
            "pacer": pacer.facts(),
            "rate_per_s": pacer.rate_per_s,
            "arrivals": workload.arrivals,
            "arrival_count": len(times_s),
            "arrival_limit": arrival_limit,
            "parameters": {
                field.name: _fact(getattr(workload, field.name)) for field in dataclasses.fields(workload)
            },
        },
    )


def with_parameters(name: str, parameters: Mapping[str, object]) -> Workload:
    """The workload with other parameters than its defaults. Strings are read as the parameter's kind."""
    if name not in WORKLOADS:
        raise ValueError(f"no workload is called {name!r}; there are {', '.join(WORKLOADS)}")
    workload: Any = WORKLOADS[name]
    known = {field.name for field in dataclasses.fields(workload)}
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"{name} has no parameter {parameter!r}; it has {', '.join(sorted(known))}")
    try:
        values = {key: _read(getattr(workload, key), value) for key, value in parameters.items()}
        changed: Workload = dataclasses.replace(workload, **values)
    except ValueError as error:
        raise ValueError(f"workload {name}: {error}") from None
    return changed


def _read(default: object, value: object) -> object:
    if isinstance(default, int | float) and isinstance(value, str):
        try:
            return int(value) if isinstance(default, int) else float(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a number") from None
    if isinstance(default, int | float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{value!r} is not a number")
        if isinstance(default, int) and not isinstance(value, int):
            raise ValueError(f"{value!r} is not a whole number")
        return value
    if isinstance(value, str | int):
        return parse_lengths(str(value))
    if not hasattr(value, "draw"):
        raise ValueError(f"{value!r} is no distribution of lengths")
    return value


def _fact(value: Any) -> object:
    return value if isinstance(value, int | float) else value.facts()
