"""Every sampling mode, every way, against one engine that does it all: answers, ends and logprobs.

The ways: handed over after the first token; computed anew where it is decoded, with some of the answer emitted
already; prefilled anew elsewhere with some of the answer emitted, and handed over; and that with a pull that fails.
In float32, where an answer does not depend on what else is in the batch: the modes run side by side.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import pytest_asyncio
from engine_pair import Pair, decoded, decoded_with_logprobs, is_idle, kv_of, prompt, running_pair

from baton.errors import BatonError, Reason
from baton.request import EngineStop, LegFinish, Sampling, Structure, StructureKind, TokenLogprobs
from engine.protocol import DecodeJob, PrefillJob
from engine.vllm_engine import VllmEngine

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

BLOCK = 32
"""The smallest there is on CPU: prompts of several blocks stay short, and two engines on a core each fast."""
STEP = 128
"""Tokens of one engine step."""
PROMPT = prompt(2 * BLOCK - 8, seed=5)
"""With eight tokens of answer it fills its blocks: what a continuation finds in a cache is more than its prompt."""
COUNT = 14
EMITTED = 10
"""How many tokens of the answer there are when it is tried again."""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Mode:
    sampling: Sampling
    stop: EngineStop = EngineStop(COUNT, ignore_eos=True)
    top_logprob_count: int | None = 5
    is_like_greedy: bool = False
    """Whether it may say what plain greedy decoding says."""


@dataclass(frozen=True)
class Said:
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: LegFinish


NOTHING = Said((), (), LegFinish.LENGTH)
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 3}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


def modes(greedy: tuple[int, ...]) -> dict[str, Mode]:
    """``greedy``: the plain answer, which modes that forbid or prefer tokens pick theirs from."""
    ends = EngineStop(COUNT)
    common = tuple(range(2_000, 12_000, 7))
    return {
        "greedy": Mode(Sampling(), is_like_greedy=True),
        "no logprobs": Mode(Sampling(), top_logprob_count=None, is_like_greedy=True),
        "logprobs of drawn tokens": Mode(Sampling(), top_logprob_count=0, is_like_greedy=True),
        "temperature": Mode(Sampling(temperature=1.0, seed=7)),
        "top_p": Mode(Sampling(temperature=1.2, top_p=0.9, seed=8)),
        "top_k": Mode(Sampling(temperature=1.2, top_k=20, seed=9)),
        "min_p": Mode(Sampling(temperature=1.5, min_p=0.02, seed=10)),
        "all filters": Mode(Sampling(temperature=1.3, top_p=0.95, top_k=50, min_p=0.01, seed=1 << 62)),
        "presence penalty": Mode(Sampling(presence_penalty=2.0)),
        "frequency penalty": Mode(Sampling(frequency_penalty=2.0)),
        "repetition penalty": Mode(Sampling(repetition_penalty=1.8)),
        "penalties and seed": Mode(
            Sampling(temperature=1.0, seed=11, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.1)
        ),
        "stop token": Mode(Sampling(), EngineStop(COUNT, stop_token_ids=(greedy[11],), ignore_eos=True), 5, True),
        "stop token at once": Mode(Sampling(), EngineStop(COUNT, stop_token_ids=(greedy[0],)), 5, True),
        "min tokens": Mode(
            Sampling(), EngineStop(COUNT, stop_token_ids=tuple(set(greedy[:12])), ignore_eos=True, min_token_count=12)
        ),
        "logit bias": Mode(Sampling(logit_bias=tuple((each, -100.0) for each in sorted(set(greedy[:6]))))),
        "allowed tokens": Mode(Sampling(allowed_token_ids=common)),
        "bad tokens": Mode(Sampling(bad_token_sequences=((greedy[0],), (greedy[1],)))),
        "bad sequences": Mode(
            Sampling(bad_token_sequences=((greedy[0], greedy[1]), tuple(greedy[8:11]), tuple(greedy[1:3])))
        ),
        "JSON schema": Mode(
            Sampling(structure=Structure(StructureKind.JSON_SCHEMA, json.dumps(SCHEMA))), EngineStop(24)
        ),
        "JSON object": Mode(Sampling(structure=Structure(StructureKind.JSON_OBJECT)), ends),
        "regex": Mode(Sampling(structure=Structure(StructureKind.REGEX, "[a-c]{3}-[0-9]{4}(x|yz){2,9}")), ends),
        "regex and seed": Mode(
            Sampling(temperature=1.0, seed=12, structure=Structure(StructureKind.REGEX, "[a-z ]{40}")), ends
        ),
        "choice": Mode(
            Sampling(structure=Structure(StructureKind.CHOICE, choices=("one two three four five six seven", "red"))),
            ends,
        ),
        "grammar": Mode(
            Sampling(structure=Structure(StructureKind.GRAMMAR, 'root ::= item | item "," root\nitem ::= [0-9]{3}')),
            ends,
        ),
        "structure and min tokens": Mode(
            Sampling(structure=Structure(StructureKind.REGEX, "(ab|cd)*")), EngineStop(COUNT, min_token_count=12)
        ),
    }


MODE_NAMES = list(modes(tuple(range(COUNT))))


def after(mode: Mode, emitted_count: int) -> EngineStop:
    return replace(mode.stop, max_token_count=mode.stop.max_token_count - emitted_count)


async def alone(engine: VllmEngine, mode: Mode, emitted: Said | None = None) -> Said:
    """Computes the prompt itself; ``emitted`` is what the answer has already."""
    before = ((), ()) if emitted is None else (emitted.token_ids, emitted.logprobs)
    count = len(before[0])
    job = DecodeJob(
        "alone",
        (*PROMPT, *before[0]),
        mode.sampling,
        after(mode, count),
        output_token_count=count,
        top_logprob_count=mode.top_logprob_count,
    )
    token_ids, logprobs, finish = await decoded_with_logprobs(engine, job)
    return Said((*before[0], *token_ids), (*before[1], *logprobs), finish)


async def handed_over(pair: Pair, mode: Mode, emitted: Said, *, in_vain: bool = False) -> Said:
    """Prefilled in one engine, with ``emitted`` of the answer, and decoded in the other, which finds the hold ended
    if it is ``in_vain``."""
    count = len(emitted.token_ids)
    ids = (*PROMPT, *emitted.token_ids)
    first = await pair.prefiller.prefill(
        PrefillJob(
            "prefill",
            ids,
            mode.sampling,
            after(mode, count),
            output_token_count=count,
            top_logprob_count=mode.top_logprob_count,
        )
    )
    logprobs = emitted.logprobs + (() if first.first_logprobs is None else (first.first_logprobs,))
    token_ids = (*emitted.token_ids, first.first_token_id)
    if first.finish is not None:
        assert first.held is None
        return Said(token_ids, logprobs, first.finish)
    pull = kv_of(first).params
    job = DecodeJob(
        "decode",
        (*ids, first.first_token_id),
        mode.sampling,
        after(mode, count + 1),
        pull={**pull, "hold_nonce": pull["hold_nonce"] ^ 1} if in_vain else pull,
        output_token_count=count + 1,
        top_logprob_count=mode.top_logprob_count,
    )
    try:
        rest, rest_logprobs, finish = await decoded_with_logprobs(pair.decoder, job)
    finally:
        await pair.prefiller.release(kv_of(first).handle)
    return Said((*token_ids, *rest), (*logprobs, *rest_logprobs), finish)


def cut(said: Said, count: int) -> Said:
    """What was said when ``count`` tokens were, or when one was left to say."""
    count = min(count, len(said.token_ids) - 1)
    return Said(said.token_ids[:count], said.logprobs[:count], said.finish)


@dataclass(frozen=True)
class Answers:
    greedy: Said
    modes: dict[str, Mode]
    one_engine: dict[str, Said]
    ways: dict[str, dict[str, Said]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[Pair]:
    sizes: dict[str, Any] = {"block_token_count": BLOCK, "max_batched_token_count": STEP, "max_running_count": 32}
    async with running_pair(dtype="float32", **sizes) as both:
        yield both


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def answers(pair: Pair) -> Answers:
    greedy = await alone(pair.decoder, Mode(Sampling()))
    asked = modes(greedy.token_ids)

    async def all_of(ask: Callable[[str, Mode], Awaitable[Said]]) -> dict[str, Said]:
        return dict(zip(asked, await asyncio.gather(*(ask(name, mode) for name, mode in asked.items())), strict=True))

    async def forget() -> None:
        await is_idle(pair.prefiller)
        await is_idle(pair.decoder)
        await asyncio.gather(pair.prefiller.reset_prefix_cache(), pair.decoder.reset_prefix_cache())

    await forget()
    one = await all_of(lambda _, mode: alone(pair.decoder, mode))
    # With what it just said in its cache: more than a prompt's worth.
    ways = {"again, warm": await all_of(lambda name, mode: alone(pair.decoder, mode, cut(one[name], EMITTED)))}
    await forget()
    ways["handed over"] = await all_of(lambda name, mode: handed_over(pair, mode, cut(one[name], 0)))
    await forget()
    ways["again, handed over"] = await all_of(lambda name, mode: handed_over(pair, mode, cut(one[name], EMITTED)))
    await forget()
    ways["again, handed over in vain"] = await all_of(
        lambda name, mode: handed_over(pair, mode, cut(one[name], EMITTED), in_vain=True)
    )
    await forget()
    return Answers(greedy, asked, one, ways)


@pytest.mark.parametrize("name", MODE_NAMES)
async def test_a_mode_says_the_same_whoever_computes_it(answers: Answers, name: str) -> None:
    mode, expected = answers.modes[name], answers.one_engine[name]
    for way, said in ((way, of_mode[name]) for way, of_mode in answers.ways.items()):
        assert said.token_ids == expected.token_ids, way
        assert said.finish is expected.finish, way
        assert_alike(said.logprobs, expected.logprobs)
    wanted = 0 if mode.top_logprob_count is None else len(expected.token_ids)
    assert len(expected.logprobs) == wanted
    assert mode.is_like_greedy or expected.token_ids != answers.greedy.token_ids, "the mode has an effect"


def assert_alike(said: tuple[TokenLogprobs, ...], expected: tuple[TokenLogprobs, ...]) -> None:
    assert len(said) == len(expected)
    for one, other in zip(said, expected, strict=True):
        # Far from the likeliest, tokens lie so close together that another batch swaps them.
        assert abs(one.rank - other.rank) <= (0 if min(one.rank, other.rank) == 1 else max(1, other.rank // 50))
        assert math.isclose(one.logprob, other.logprob, abs_tol=TOLERANCE)
        assert len(one.top) == len(other.top)
        others = dict(other.top)
        for (token_id, a), (_, b) in zip(one.top, other.top, strict=True):
            assert math.isclose(a, b, abs_tol=TOLERANCE)
            assert math.isclose(a, others.get(token_id, a), abs_tol=TOLERANCE)  # or the last of them is another
        assert len(others.keys() - dict(one.top).keys()) <= 1
    cumulative = sum(each.logprob for each in said), sum(each.logprob for each in expected)
    assert math.isclose(*cumulative, abs_tol=TOLERANCE * max(1, len(said)))


async def test_logprobs_are_of_the_drawn_and_the_likeliest(answers: Answers) -> None:
    for logprobs in answers.one_engine["greedy"].logprobs:
        assert logprobs.rank == 1
        assert len(logprobs.top) == 5
        assert logprobs.top[0][1] == logprobs.logprob
        assert [logprob for _, logprob in logprobs.top] == sorted((each for _, each in logprobs.top), reverse=True)
    for logprobs in answers.one_engine["logprobs of drawn tokens"].logprobs:
        assert logprobs.top == ()
        assert logprobs.logprob < 0


REFUSED = {
    "a schema that is none": Structure(StructureKind.JSON_SCHEMA, '{"type": "nosuch"}'),
    "a schema that nothing satisfies": Structure(
        StructureKind.JSON_SCHEMA, '{"type":"integer","minimum":5,"maximum":3}'
    ),
    "a schema of itself": Structure(StructureKind.JSON_SCHEMA, '{"$ref": "#"}'),
    "a schema from elsewhere": Structure(StructureKind.JSON_SCHEMA, '{"$ref": "http://127.0.0.1/schema"}'),
    "no JSON": Structure(StructureKind.JSON_SCHEMA, "{"),
    "an open bracket": Structure(StructureKind.REGEX, "(a"),
    "a look-ahead": Structure(StructureKind.REGEX, "(?=a)b"),
    "too many brackets": Structure(StructureKind.REGEX, "(" * 10_000 + "a" + ")" * 10_000),
    "a million repeats": Structure(StructureKind.REGEX, "((a{100}){100}){100}"),
    "a rule that is missing": Structure(StructureKind.GRAMMAR, "root ::= nosuch"),
    "a rule of itself": Structure(StructureKind.GRAMMAR, "root ::= root"),
    "no grammar": Structure(StructureKind.GRAMMAR, "$$$"),
    "an ambiguous grammar": Structure(StructureKind.GRAMMAR, 'root ::= root root | "a" | [a-z]+ | ""'),
    "properties in any of too many orders": Structure(
        StructureKind.JSON_SCHEMA, json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(1500)}})
    ),
    "no choice": Structure(StructureKind.CHOICE),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_structure_that_cannot_be_followed_fails_its_request_alone(pair: Pair, name: str) -> None:
    structure = REFUSED[name]
    mode = Mode(Sampling(structure=structure), EngineStop(COUNT))
    attempts: list[Callable[[], Awaitable[Said]]] = [
        lambda: alone(pair.decoder, mode),
        lambda: handed_over(pair, mode, NOTHING),
    ]
    for attempt in attempts:
        with pytest.raises(BatonError) as caught:
            await attempt()
        assert caught.value.reason is Reason.INVALID_REQUEST
        assert [each.field for each in caught.value.violations] == ["sampling.structure"]
        assert structure.text[:20] not in str(caught.value) or not structure.text
    await is_idle(pair.decoder)
    await is_idle(pair.prefiller)


async def test_emitted_tokens_that_do_not_match_their_structure_fail_their_request_alone(pair: Pair) -> None:
    mode = Mode(Sampling(structure=Structure(StructureKind.REGEX, "[0-9]{9}")), EngineStop(COUNT), None)
    forged = Said(PROMPT[:3], (), LegFinish.STOP)
    fine = asyncio.create_task(alone(pair.decoder, Mode(Sampling())))
    with pytest.raises(BatonError) as caught:
        await alone(pair.decoder, mode, forged)
    assert [each.field for each in caught.value.violations] == ["sampling.structure"]
    assert len((await fine).token_ids) == COUNT
    await is_idle(pair.decoder)


async def test_a_structure_that_no_allowed_token_may_follow_fails_its_request_alone(pair: Pair) -> None:
    sampling = Sampling(allowed_token_ids=PROMPT[:1], structure=Structure(StructureKind.REGEX, "[0-9]{9}"))
    with pytest.raises(BatonError) as caught:
        await alone(pair.decoder, Mode(sampling, EngineStop(COUNT), None))
    assert [each.field for each in caught.value.violations] == ["sampling.structure"]
    await is_idle(pair.decoder)


async def test_tenants_share_no_prefix(pair: Pair) -> None:
    ids = prompt(2 * BLOCK + 5, seed=6)
    cached = []
    for tenant in ("a", "a", "b", ""):
        job = DecodeJob("leg", ids, Sampling(), EngineStop(1), tenant=tenant)
        adopted, _, _ = await decoded(pair.decoder, job)
        cached.append(adopted.cached_token_count)
    assert cached == [0, 2 * BLOCK, 0, 0]


async def test_a_continuation_says_what_it_found_in_the_cache(pair: Pair) -> None:
    """vLLM's own count is of the prompt alone."""
    ids = prompt(2 * BLOCK + 5, seed=7)
    jobs = [DecodeJob("leg", ids, Sampling(), EngineStop(1), output_token_count=count) for count in (0, BLOCK + 10)]
    cached = []
    for job in jobs:
        adopted, _, _ = await decoded(pair.decoder, job)
        cached.append(adopted.cached_token_count)
    assert cached == [0, 2 * BLOCK]


async def test_a_continuation_of_several_steps_draws_no_more_than_its_tokens(pair: Pair) -> None:
    """A step that computes only part of what came before draws nothing that counts."""
    ids = prompt(2 * STEP + 20, seed=8)
    sampling = Sampling(temperature=1.0, seed=13, presence_penalty=1.0)
    await pair.decoder.reset_prefix_cache()
    _, whole, _ = await decoded(pair.decoder, DecodeJob("whole", ids, sampling, EngineStop(8, ignore_eos=True)))
    await pair.decoder.reset_prefix_cache()
    job = DecodeJob("rest", (*ids, *whole[:5]), sampling, EngineStop(3, ignore_eos=True), output_token_count=5)
    adopted, rest, _ = await decoded(pair.decoder, job)
    assert adopted.cached_token_count == 0
    assert [*whole[:5], *rest] == whole
