"""The fake refuses nothing that the router takes, and names the same fields for what both refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.errors import BatonError, FieldViolation
from baton.prompts import chat_prompt
from baton.request import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    OutputOptions,
    ResumeOptions,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolChoice,
)
from baton.testing.fake_rules import check_request
from baton.testing.fake_script import Scripted, decode, encode, sample_of
from router.validation import ModelLimits, violations_of

LIMITS = ModelLimits("tiny", 0x110000, 4096, (0,))
PLAIN = GenerateRequest(TextPrompt("hi"))
CHAT = (ChatMessage("user", "hi"),)
ANY_OBJECT = Structure(StructureKind.JSON_OBJECT)
DRAWN = Sampling(temperature=1.0)

GOOD = [
    PLAIN,
    GenerateRequest(TokenPrompt((1, 2))),
    replace(PLAIN, sampling=Sampling(2.0, 1.0, 5, 1.0, 0, -2.0, 2.0, 0.01, ((1, 100.0),))),
    replace(PLAIN, stop=StopConditions(5, ("x" * 256,) * 16, (1,), True, 5)),
    replace(PLAIN, output=OutputOptions(max_chunk_token_count=2**31 - 1)),
    replace(PLAIN, output=OutputOptions(top_logprob_count=20, echo_prompt=True, prompt_logprob_count=0)),
    replace(PLAIN, priority=-100, session_id="s" * 128, correlation_id="c" * 128, tenant="a.b-c_1"),
    replace(PLAIN, sample_count=16, sampling=DRAWN),
    replace(PLAIN, resume=ResumeOptions(0.5)),
    replace(PLAIN, sampling=Sampling(structure=ANY_OBJECT)),
]
BAD = [
    GenerateRequest(TextPrompt("")),
    GenerateRequest(TokenPrompt(())),
    GenerateRequest(TokenPrompt((1, -1, 0x110000))),
    *(
        replace(PLAIN, sampling=Sampling(**{name: value}))  # type: ignore[arg-type]
        for name, value in {
            "temperature": 2.1, "top_p": 0.0, "top_k": -1, "min_p": 1.5, "seed": -1, "presence_penalty": 2.5,
            "frequency_penalty": float("nan"), "repetition_penalty": 0.0, "logit_bias": ((1, 101.0),),
            "structure": Structure(StructureKind.JSON_SCHEMA, "no json"),
        }.items()
    ),
    replace(PLAIN, sampling=Sampling(structure=ANY_OBJECT), stop=StopConditions(ignore_eos=True)),
    *(
        replace(PLAIN, stop=stop)
        for stop in (
            StopConditions(0), StopConditions(5, min_output_token_count=6), StopConditions(stop_sequences=("",)),
            StopConditions(stop_sequences=("x",) * 17),
        )
    ),
    *(
        replace(PLAIN, output=OutputOptions(**{name: value}))  # type: ignore[arg-type]
        for name, value in {"max_chunk_token_count": 0, "top_logprob_count": 21, "prompt_logprob_count": -1}.items()
    ),
    replace(PLAIN, priority=101),
    replace(PLAIN, session_id="s" * 129),
    replace(PLAIN, correlation_id="c" * 129),
    replace(PLAIN, tenant="a b"),
    replace(PLAIN, sample_count=17, sampling=DRAWN),
    replace(PLAIN, sample_count=2),
    replace(PLAIN, resume=ResumeOptions(0.0)),
    replace(PLAIN, resume=ResumeOptions(), output=OutputOptions(echo_prompt=True)),
    replace(PLAIN, resume=ResumeOptions(), output=OutputOptions(prompt_logprob_count=0)),
]  # fmt: skip
BAD_CHATS = {
    "chat.messages": ChatPrompt(()),
    "chat.messages[0].role": ChatPrompt((ChatMessage("", "hi"),)),
    "chat.tools[0].name": ChatPrompt(CHAT, (Tool("no good"),)),
    "chat.tools[0].parameters_json_schema": ChatPrompt(CHAT, (Tool("f", "", "[]"),)),
    "chat.tool_choice.mode": ChatPrompt(CHAT, (), ToolChoice.REQUIRED),
    "chat.tool_choice.tool_name": ChatPrompt(CHAT, (Tool("f"),), ToolChoice.REQUIRED, "g"),
    "chat.template_arguments_json": ChatPrompt(CHAT, template_arguments_json="[]"),
}


def refused_fields(request: GenerateRequest) -> set[str]:
    try:
        check_request(request, model="tiny", max_context_token_count=4096, prompt_length=2)
    except BatonError as error:
        return fields(error.violations)
    return set()


def fields(violations: tuple[FieldViolation, ...] | list[FieldViolation]) -> set[str]:
    return {each.field for each in violations}


@pytest.mark.parametrize("request_", GOOD)
def test_what_the_router_takes_the_fake_takes(request_: GenerateRequest) -> None:
    assert violations_of(request_, LIMITS) == []
    assert refused_fields(request_) == set()


@pytest.mark.parametrize("request_", BAD)
def test_what_the_fake_refuses_the_router_refuses_for_the_same_fields(request_: GenerateRequest) -> None:
    assert refused_fields(request_) == fields(violations_of(request_, LIMITS)) != set()


@pytest.mark.parametrize(("field", "prompt"), BAD_CHATS.items())
def test_a_chat_that_is_none_is_refused(field: str, prompt: ChatPrompt) -> None:
    assert refused_fields(GenerateRequest(prompt)) == {field}


def test_a_chat_with_tools_and_arguments_is_taken() -> None:
    prompt = chat_prompt(CHAT, tools=[{"name": "f", "parameters": {}}], template_arguments={"x": 1})
    assert refused_fields(GenerateRequest(prompt)) == set()


def test_every_text_has_tokens_and_every_token_a_text() -> None:
    assert decode(encode("Grüße, 世界 🎉")) == "Grüße, 世界 🎉"
    assert decode((0xD800, 65)) == "\ufffdA"


def test_the_context_bounds_the_answer() -> None:
    sample = sample_of(Scripted((("abcdef",),)), PLAIN, 0, room=3)
    assert (len(sample.tokens), sample.reason.value) == (3, "context_full")
