"""The sampling modes, said twice; what is asked in each; and what counts as the same answer. Pure.

The two columns of ``modes`` are written by hand, side by side: nothing derives vLLM's words from Baton's, or a
mistake in Baton's own mapping would be made twice and not be seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from baton.client import Finished, TokenLogprob
from baton.errors import BatonError
from baton.request import Sampling, StopConditions, Structure, StructureKind
from bench.corpus import Corpus
from bench.exactness import OracleAnswer
from bench.oracle import OraclePrompt

LOGPROB_GAP = 2e-3
"""Nats by which a log probability may differ between two float32 engines that batched differently."""
TOP_COUNT = 5
PROMPT_LENGTHS = (5, 17, 64, 127, 128, 129, 200, 255, 256, 257, 320, 520)
"""Around the block size of 128, and one longer than the 512 tokens that a step of the fleet's engines takes."""

Encode = Callable[[str], Sequence[int]]

SCHEMA = (
    '{"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "size": {"type": "integer"}}, '
    '"required": ["city", "size"], "additionalProperties": false}'
)
GRAMMAR = 'root ::= "the " noun (" and the " noun)*\nnoun ::= "file" | "name" | "value"'


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to draw, twice: for Baton (``sampling``, ``stop``) and for vLLM (``words``, and in ``stop`` what the
    oracle has fields of its own for: stop tokens, EOS, the longest)."""

    name: str
    sampling: Sampling
    stop: StopConditions
    words: dict[str, Any]
    prompt: str = "prose"
    """"prose", "chat" (for structures) or "ending" (the model would say end-of-sequence at once)."""


def modes(encode: Encode, seed: int) -> list[Mode]:
    """Every mode of the public API, alone and together. ``seed``: of the draws, the same for both."""
    (the,), (of,), (comma,), (full_stop,) = encode(" the"), encode(" of"), encode(","), encode(".")
    (bare_the,), (bare_of,) = encode("the"), encode("of")
    some = sorted(
        {token for text in (" a b c the of in is and to or, it as .", "\n name value") for token in encode(text)}
    )
    stop = StopConditions(max_output_token_count=16, ignore_eos=True)
    open_end = StopConditions(max_output_token_count=40)
    drawn = Sampling(temperature=0.8, seed=seed)
    words: dict[str, Any] = {"temperature": 0.8, "seed": seed}
    return [
        Mode("greedy", Sampling(), stop, {}),
        Mode("seed", drawn, stop, words),
        Mode("seed, hot", Sampling(temperature=1.7, seed=seed), stop, {"temperature": 1.7, "seed": seed}),
        Mode("top-p", replace(drawn, top_p=0.6), stop, {**words, "top_p": 0.6}),
        Mode("top-k", replace(drawn, top_k=7), stop, {**words, "top_k": 7}),
        Mode("min-p", replace(drawn, min_p=0.15), stop, {**words, "min_p": 0.15}),
        Mode("presence penalty", Sampling(presence_penalty=1.5), stop, {"presence_penalty": 1.5}),
        Mode(
            "presence penalty, seed", replace(drawn, presence_penalty=2.0), stop, {**words, "presence_penalty": 2.0}
        ),
        Mode("frequency penalty", Sampling(frequency_penalty=0.9), stop, {"frequency_penalty": 0.9}),
        Mode("negative frequency penalty", Sampling(frequency_penalty=-1.0), stop, {"frequency_penalty": -1.0}),
        Mode("repetition penalty", Sampling(repetition_penalty=1.3), stop, {"repetition_penalty": 1.3}),
        Mode(
            "logit bias",
            Sampling(logit_bias=((the, -100.0), (of, -4.0), (comma, 3.5))),
            stop,
            {"logit_bias": {str(the): -100.0, str(of): -4.0, str(comma): 3.5}},
        ),
        Mode(
            "allowed tokens",
            replace(drawn, allowed_token_ids=tuple(some)),
            stop,
            {**words, "allowed_token_ids": some},
        ),
        Mode(
            "bad sequences",
            Sampling(bad_token_sequences=((the,), (bare_the,), (of,), (bare_of,))),
            stop,
            {"bad_words": ["the", "of"]},
        ),
        Mode(
            "least length",
            Sampling(),
            StopConditions(max_output_token_count=16, min_output_token_count=7),
            {"min_tokens": 7},
            prompt="ending",
        ),
        Mode(
            "least length, stop tokens",
            drawn,
            StopConditions(
                max_output_token_count=16, stop_token_ids=(comma, full_stop, the), min_output_token_count=5
            ),
            {**words, "min_tokens": 5},
        ),
        Mode("stop tokens", Sampling(), replace(stop, stop_token_ids=(comma, full_stop)), {}),
        Mode(
            "stop sequences",
            drawn,
            replace(stop, stop_sequences=(" th", ". ", "e,")),
            {**words, "stop": [" th", ". ", "e,"]},
        ),
        Mode(
            "all together",
            Sampling(0.9, 0.95, 60, 0.01, seed, 0.6, 0.4, 1.1, ((comma, 1.5),), (), ((the,), (bare_the,))),
            StopConditions(
                max_output_token_count=20,
                stop_token_ids=(full_stop,),
                stop_sequences=("ing ",),
                min_output_token_count=6,
            ),
            {
                "temperature": 0.9,
                "top_p": 0.95,
                "top_k": 60,
                "min_p": 0.01,
                "seed": seed,
                "presence_penalty": 0.6,
                "frequency_penalty": 0.4,
                "repetition_penalty": 1.1,
                "logit_bias": {str(comma): 1.5},
                "bad_words": ["the"],
                "stop": ["ing "],
                "min_tokens": 6,
            },
        ),
        Mode(
            "JSON schema",
            Sampling(structure=Structure(StructureKind.JSON_SCHEMA, SCHEMA)),
            open_end,
            {"structured_outputs": {"json": SCHEMA}},
            prompt="chat",
        ),
        Mode(
            "JSON schema, seed and penalty",
            replace(drawn, frequency_penalty=0.3, structure=Structure(StructureKind.JSON_SCHEMA, SCHEMA)),
            open_end,
            {**words, "frequency_penalty": 0.3, "structured_outputs": {"json": SCHEMA}},
            prompt="chat",
        ),
        Mode(
            "JSON object",
            replace(drawn, structure=Structure(StructureKind.JSON_OBJECT)),
            open_end,
            {**words, "structured_outputs": {"json_object": True}},
            prompt="chat",
        ),
        Mode(
            "regex",
            replace(drawn, structure=Structure(StructureKind.REGEX, r"[A-Z][a-z]{2,8}(, [a-z]{3,9}){1,4}\.")),
            open_end,
            {**words, "structured_outputs": {"regex": r"[A-Z][a-z]{2,8}(, [a-z]{3,9}){1,4}\."}},
            prompt="chat",
        ),
        Mode(
            "choice",
            replace(drawn, structure=Structure(StructureKind.CHOICE, choices=("New York City", "New Delhi", "Oslo"))),
            open_end,
            {**words, "structured_outputs": {"choice": ["New York City", "New Delhi", "Oslo"]}},
            prompt="chat",
        ),
        Mode(
            "grammar",
            replace(drawn, structure=Structure(StructureKind.GRAMMAR, GRAMMAR)),
            open_end,
            {**words, "structured_outputs": {"grammar": GRAMMAR}},
            prompt="chat",
        ),
    ]


@dataclass(frozen=True, slots=True)
class Question:
    name: str
    mode: Mode
    prompt_token_ids: tuple[int, ...] = field(repr=False)

    def for_oracle(self) -> OraclePrompt:
        stop = self.mode.stop
        assert stop.max_output_token_count is not None
        return OraclePrompt(
            self.name, self.prompt_token_ids, stop.max_output_token_count, stop.ignore_eos, stop.stop_token_ids,
            self.mode.words,
        )  # fmt: skip


def questions(corpus: Corpus, per_mode: int, seed: int) -> list[Question]:
    """``per_mode`` prompts of each mode, of the lengths in turn."""
    rng = random.Random(seed)  # noqa: S311 a reproducible choice of lengths
    asked = []
    for number in range(per_mode):
        for place, mode in enumerate(
            modes(lambda text: corpus.tokenizer.encode(text, add_special_tokens=False).ids, number)
        ):
            length = PROMPT_LENGTHS[(number + 5 * place) % len(PROMPT_LENGTHS)] + rng.randrange(3)
            asked.append(Question(f"{mode.name} {number}", mode, _prompt(corpus, mode.prompt, length)))
    return asked


_TAILS = {
    "prose": ("", ""),
    "chat": (
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\nName a city and its size.<|im_end|>\n<|im_start|>assistant\n",
    ),
    "ending": (
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris.",
    ),
}


def _prompt(corpus: Corpus, kind: str, length: int) -> tuple[int, ...]:
    """Of ``length`` tokens, or of so many as the kind needs."""
    head, tail = (corpus.tokenizer.encode(text, add_special_tokens=False).ids for text in _TAILS[kind])
    return (*head, *corpus.prompt(max(1, length - len(head) - len(tail))), *tail)


@dataclass(slots=True)
class HeardMode:
    """What came through the service."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None
    error: BatonError | None = None
    count_at_death: int = -1
    """Tokens it had when its decode worker was killed."""


@dataclass(frozen=True, slots=True)
class ModeVerdict:
    """``kind``: "exact", "tie" or "wrong"."""

    question: str
    placement: str
    kind: str
    detail: str = ""
    index: int = -1
    came: int = -1
    attempt_count: int = 1
    rank_difference_count: int = 0
    handover: str = ""
    recomputed_token_count: int = 0
    count_at_death: int = -1


def judge_mode(question: Question, placement: str, wanted: OracleAnswer, heard: HeardMode) -> ModeVerdict:
    """Token ids, text, ending, log probabilities and their sum; anything else is wrong, for now."""
    finished = heard.finished
    if finished is None:
        reason = "no end" if heard.error is None else heard.error.reason.value
        return ModeVerdict(question.name, placement, "wrong", f"failed: {reason}")

    def wrong(detail: str, index: int = -1, came: int = -1) -> ModeVerdict:
        return ModeVerdict(question.name, placement, "wrong", detail, index, came, finished.phases.attempt_count)

    for index, (want, came) in enumerate(zip(wanted.token_ids, heard.token_ids, strict=False)):
        if want != came:
            return wrong(f"position {index}: {came} for {want}", index, came)
    if len(wanted.token_ids) != len(heard.token_ids):
        return wrong(f"{len(heard.token_ids)} tokens for {len(wanted.token_ids)}")
    # A text may end inside a character: one side says U+FFFD there, the other nothing.
    if wanted.text.rstrip("\ufffd") != heard.text.rstrip("\ufffd"):
        return wrong("same tokens, another text")
    ending = "stop" if finished.reason is not None and finished.reason.name == "STOP" else "length"
    if ending != wanted.finish:
        return wrong(f"ended by {ending} for {wanted.finish}")
    if [each.token_id for each in heard.logprobs] != list(wanted.token_ids):
        return wrong("logprobs of other tokens")
    rank_difference_count = 0
    for index, (each, (logprob, rank)) in enumerate(zip(heard.logprobs, wanted.logprobs, strict=True)):
        if not abs(each.logprob - logprob) <= LOGPROB_GAP:
            return wrong(f"position {index}: logprob {each.logprob:.5f} for {logprob:.5f}")
        if len(each.top) != TOP_COUNT:
            return wrong(f"position {index}: {len(each.top)} likeliest for {TOP_COUNT}")
        rank_difference_count += each.rank != rank
    total = math.fsum(logprob for logprob, _ in wanted.logprobs)
    if finished.cumulative_logprob is None or not abs(finished.cumulative_logprob - total) <= LOGPROB_GAP * max(
        1, len(wanted.logprobs)
    ):
        return wrong(f"cumulative logprob {finished.cumulative_logprob} for {total:.5f}")
    phases = finished.phases
    return ModeVerdict(
        question.name,
        placement,
        "exact",
        attempt_count=phases.attempt_count,
        rank_difference_count=rank_difference_count,
        handover="" if phases.handover is None else phases.handover.value,
        recomputed_token_count=phases.recomputed_token_count,
        count_at_death=heard.count_at_death,
    )
