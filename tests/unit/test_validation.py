"""Requests: every broken rule is named, with its field, value and bound, before anything is computed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from baton.errors import BatonError, Reason, StatusName
from baton.request import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    OutputOptions,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    TextPrompt,
    TokenPrompt,
)
from router.chats.chat_template import ChatTemplate
from router.prompt_encoder import PromptEncoder
from router.tiny_model import CHAT_TEMPLATE, tiny_tokenizer
from router.tokenizer import Tokenizer
from router.validation import ModelLimits, check, check_prompt_length, resolved_output_token_count, violations_of

LIMITS = ModelLimits("tiny", vocab_size=300, max_context_token_count=64, eos_token_ids=(2,))
JSON = Structure(StructureKind.JSON_OBJECT)
GOOD = TextPrompt("hello")


def fields(request: GenerateRequest) -> list[str]:
    return [violation.field for violation in violations_of(request, LIMITS)]


def test_a_plain_request_breaks_no_rule() -> None:
    assert fields(GenerateRequest(GOOD)) == []
    edges = GenerateRequest(
        TokenPrompt((0, 299)),
        model="tiny",
        sampling=Sampling(
            temperature=2.0,
            top_p=1.0,
            top_k=0,
            min_p=1.0,
            seed=2**63 - 1,
            presence_penalty=-2.0,
            frequency_penalty=2.0,
            repetition_penalty=0.01,
            logit_bias=tuple((token_id, 100.0 - token_id) for token_id in range(200)),
            allowed_token_ids=(1, 299),
            bad_token_sequences=((1,) * 16,) * 64,
        ),
        stop=StopConditions(1, ("x" * 256,) * 16, tuple(range(64)), min_output_token_count=1),
        output=OutputOptions(max_chunk_token_count=1, top_logprob_count=20),
        priority=-100,
        session_id="s" * 128,
        tenant="aA0_.-" + "x" * 58,
    )
    check(edges, LIMITS)
    for structure in (
        JSON,
        Structure(StructureKind.JSON_SCHEMA, '{"type": "object"}'),
        Structure(StructureKind.REGEX, "[a-z]{1,1024}"),
        Structure(StructureKind.CHOICE, choices=("yes",) * 256),
        Structure(StructureKind.GRAMMAR, 'root ::= "a"'),
    ):
        check(GenerateRequest(GOOD, sampling=Sampling(structure=structure, logit_bias=((1, 1.0),))), LIMITS)
    biases = tuple((token_id, -100.0) for token_id in range(1024))
    check(GenerateRequest(GOOD, sampling=Sampling(logit_bias=biases)), replace(LIMITS, vocab_size=1024))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (GenerateRequest(TextPrompt("")), "prompt"),
        (GenerateRequest(TokenPrompt(())), "token_ids.ids"),
        (GenerateRequest(TokenPrompt((1, 300))), "token_ids.ids[1]"),
        (GenerateRequest(TokenPrompt((-1,))), "token_ids.ids[0]"),
        (GenerateRequest(ChatPrompt(())), "chat.messages"),
        (GenerateRequest(ChatPrompt((ChatMessage("", "x"),))), "chat.messages[0].role"),
        (GenerateRequest(ChatPrompt((ChatMessage("r" * 65, "x"),))), "chat.messages[0].role"),
        (GenerateRequest(ChatPrompt((ChatMessage("user", "x"),) * 1025)), "chat.messages"),
        (GenerateRequest(GOOD, sampling=Sampling(temperature=-0.1)), "sampling.temperature"),
        (GenerateRequest(GOOD, sampling=Sampling(temperature=2.01)), "sampling.temperature"),
        (GenerateRequest(GOOD, sampling=Sampling(temperature=math.nan)), "sampling.temperature"),
        (GenerateRequest(GOOD, sampling=Sampling(temperature=math.inf)), "sampling.temperature"),
        (GenerateRequest(GOOD, sampling=Sampling(top_p=0.0)), "sampling.top_p"),
        (GenerateRequest(GOOD, sampling=Sampling(top_p=1.1)), "sampling.top_p"),
        (GenerateRequest(GOOD, sampling=Sampling(top_p=math.nan)), "sampling.top_p"),
        (GenerateRequest(GOOD, sampling=Sampling(top_k=-1)), "sampling.top_k"),
        (GenerateRequest(GOOD, sampling=Sampling(min_p=-0.5)), "sampling.min_p"),
        (GenerateRequest(GOOD, sampling=Sampling(min_p=math.nan)), "sampling.min_p"),
        (GenerateRequest(GOOD, sampling=Sampling(seed=-1)), "sampling.seed"),
        (GenerateRequest(GOOD, stop=StopConditions(0)), "stop.max_output_token_count"),
        (GenerateRequest(GOOD, stop=StopConditions(stop_sequences=("",))), "stop.stop_sequences[0]"),
        (GenerateRequest(GOOD, stop=StopConditions(stop_sequences=("é" * 129,))), "stop.stop_sequences[0]"),
        (GenerateRequest(GOOD, stop=StopConditions(stop_sequences=("x",) * 17)), "stop.stop_sequences"),
        (GenerateRequest(GOOD, stop=StopConditions(stop_token_ids=(300,))), "stop.stop_token_ids[0]"),
        (GenerateRequest(GOOD, stop=StopConditions(stop_token_ids=(1,) * 65)), "stop.stop_token_ids"),
        (GenerateRequest(GOOD, output=OutputOptions(max_chunk_token_count=0)), "output.max_chunk_token_count"),
        (GenerateRequest(GOOD, output=OutputOptions(max_chunk_token_count=-1)), "output.max_chunk_token_count"),
        (GenerateRequest(GOOD, sampling=Sampling(presence_penalty=2.01)), "sampling.presence_penalty"),
        (GenerateRequest(GOOD, sampling=Sampling(presence_penalty=math.nan)), "sampling.presence_penalty"),
        (GenerateRequest(GOOD, sampling=Sampling(frequency_penalty=-2.01)), "sampling.frequency_penalty"),
        (GenerateRequest(GOOD, sampling=Sampling(repetition_penalty=0.0)), "sampling.repetition_penalty"),
        (GenerateRequest(GOOD, sampling=Sampling(repetition_penalty=100.5)), "sampling.repetition_penalty"),
        (GenerateRequest(GOOD, sampling=Sampling(repetition_penalty=math.inf)), "sampling.repetition_penalty"),
        (GenerateRequest(GOOD, sampling=Sampling(logit_bias=((1, 0.0),) * 1025)), "sampling.logit_bias"),
        (GenerateRequest(GOOD, sampling=Sampling(logit_bias=((1, 1.0), (1, 2.0)))), "sampling.logit_bias"),
        (
            GenerateRequest(GOOD, sampling=Sampling(logit_bias=((1, 0.0), (300, 1.0)))),
            "sampling.logit_bias[1].token_id",
        ),
        (GenerateRequest(GOOD, sampling=Sampling(logit_bias=((1, 100.5),))), "sampling.logit_bias[0].bias"),
        (GenerateRequest(GOOD, sampling=Sampling(logit_bias=((1, math.nan),))), "sampling.logit_bias[0].bias"),
        (GenerateRequest(GOOD, sampling=Sampling(allowed_token_ids=(1, 300))), "sampling.allowed_token_ids.ids[1]"),
        (GenerateRequest(GOOD, sampling=Sampling(allowed_token_ids=(1, 1))), "sampling.allowed_token_ids.ids"),
        (GenerateRequest(GOOD, sampling=Sampling(bad_token_sequences=((1,),) * 65)), "sampling.bad_token_sequences"),
        (GenerateRequest(GOOD, sampling=Sampling(bad_token_sequences=((),))), "sampling.bad_token_sequences[0].ids"),
        (
            GenerateRequest(GOOD, sampling=Sampling(bad_token_sequences=((1,), (1,) * 17))),
            "sampling.bad_token_sequences[1].ids",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(bad_token_sequences=((1, -1),))),
            "sampling.bad_token_sequences[0].ids[1]",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(allowed_token_ids=(5, 6), bad_token_sequences=((5,), (7, 6)))),
            "sampling.allowed_token_ids",
        ),
        (
            GenerateRequest(
                GOOD,
                sampling=Sampling(allowed_token_ids=(2, 9)),
                stop=StopConditions(stop_token_ids=(9,), min_output_token_count=1),
            ),
            "sampling.allowed_token_ids",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(structure=Structure(StructureKind.JSON_SCHEMA, "{"))),
            "sampling.structure.json_schema",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(structure=Structure(StructureKind.REGEX, "a" * 65537))),
            "sampling.structure.regex",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(structure=Structure(StructureKind.GRAMMAR, " "))),
            "sampling.structure.grammar",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(structure=Structure(StructureKind.CHOICE))),
            "sampling.structure.choice",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(structure=Structure(StructureKind.CHOICE, choices=("a", "")))),
            "sampling.structure.choice",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(structure=JSON), stop=StopConditions(ignore_eos=True)),
            "stop.ignore_eos",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(structure=JSON), stop=StopConditions(min_output_token_count=1)),
            "stop.min_output_token_count",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(structure=JSON, allowed_token_ids=(1,))),
            "sampling.allowed_token_ids",
        ),
        (
            GenerateRequest(GOOD, sampling=Sampling(structure=JSON, bad_token_sequences=((1,),))),
            "sampling.bad_token_sequences",
        ),
        (GenerateRequest(GOOD, stop=StopConditions(min_output_token_count=-1)), "stop.min_output_token_count"),
        (GenerateRequest(GOOD, stop=StopConditions(min_output_token_count=65)), "stop.min_output_token_count"),
        (GenerateRequest(GOOD, stop=StopConditions(4, min_output_token_count=5)), "stop.min_output_token_count"),
        (GenerateRequest(GOOD, output=OutputOptions(top_logprob_count=-1)), "output.top_logprob_count"),
        (GenerateRequest(GOOD, output=OutputOptions(top_logprob_count=21)), "output.top_logprob_count"),
        (GenerateRequest(GOOD, tenant="t" * 65), "tenant"),
        (GenerateRequest(GOOD, tenant="a/b"), "tenant"),
        (GenerateRequest(GOOD, tenant="é"), "tenant"),
        (GenerateRequest(GOOD, tenant="a\n"), "tenant"),
        (GenerateRequest(GOOD, priority=101), "priority"),
        (GenerateRequest(GOOD, session_id="s" * 129), "session_id"),
        (GenerateRequest(GOOD, correlation_id="é" * 65), "correlation_id"),
    ],
)
def test_each_broken_rule_names_its_field_and_its_bound(request_: GenerateRequest, field: str) -> None:
    (violation,) = violations_of(request_, LIMITS)
    assert violation.field == field
    assert any(
        word in violation.description
        for word in ("must", "at most", "at least", "give", "say", "are 0 to", "leave", "add", "name", "put")
    )


def test_no_violation_repeats_what_a_structure_says() -> None:
    secret = '{"properties": {"hunter2": '
    (violation,) = violations_of(
        GenerateRequest(GOOD, sampling=Sampling(structure=Structure(StructureKind.JSON_SCHEMA, secret))), LIMITS
    )
    assert "hunter2" not in violation.description


def test_all_broken_rules_are_listed_at_once() -> None:
    request = GenerateRequest(
        TextPrompt(""), sampling=Sampling(temperature=9.0, top_p=0.0), stop=StopConditions(0), priority=1000
    )
    with pytest.raises(BatonError) as refused:
        check(request, LIMITS)
    assert refused.value.reason is Reason.INVALID_REQUEST
    assert [violation.field for violation in refused.value.violations] == [
        "prompt",
        "sampling.temperature",
        "sampling.top_p",
        "stop.max_output_token_count",
        "priority",
    ]


def test_an_unknown_model_is_not_found_and_the_served_one_is_named() -> None:
    with pytest.raises(BatonError) as refused:
        check(GenerateRequest(GOOD, model="gpt-9"), LIMITS)
    assert refused.value.status is StatusName.NOT_FOUND
    assert refused.value.metadata == {"model": "gpt-9", "available": "tiny"}


def test_a_token_prompt_that_leaves_no_room_for_one_token_is_too_long() -> None:
    check(GenerateRequest(TokenPrompt((1,) * 63)), LIMITS)
    with pytest.raises(BatonError) as refused:
        check(GenerateRequest(TokenPrompt((1,) * 64)), LIMITS)
    assert refused.value.reason is Reason.PROMPT_TOO_LONG


def test_a_prompt_that_tokenised_to_nothing_is_refused() -> None:
    with pytest.raises(BatonError, match="no tokens"):
        check_prompt_length(0, LIMITS)


def test_the_output_is_cut_to_what_the_context_has_left() -> None:
    assert resolved_output_token_count(None, 60, LIMITS) == 4
    assert resolved_output_token_count(100, 60, LIMITS) == 4
    assert resolved_output_token_count(3, 60, LIMITS) == 3


TINY = Tokenizer(tiny_tokenizer(), vocab_size=300, eos_token_ids=(2,))


async def test_a_chat_is_rendered_and_its_special_tokens_are_not_doubled() -> None:
    encoder = PromptEncoder(TINY, ChatTemplate(CHAT_TEMPLATE))
    ids = await encoder.encode(ChatPrompt((ChatMessage("user", "hi"),)), LIMITS)
    assert ids == TINY.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)


async def test_a_chat_too_long_for_the_context_is_refused_while_it_is_rendered() -> None:
    encoder = PromptEncoder(TINY, ChatTemplate(CHAT_TEMPLATE))
    with pytest.raises(BatonError) as refused:
        await encoder.encode(ChatPrompt((ChatMessage("user", "word " * 10_000),)), LIMITS)
    assert refused.value.reason is Reason.PROMPT_TOO_LONG


async def test_a_model_without_a_chat_template_says_so() -> None:
    with pytest.raises(BatonError, match="no chat template"):
        await PromptEncoder(TINY, None).encode(ChatPrompt((ChatMessage("user", "hi"),)), LIMITS)
