"""Templates with tools: the same text as transformers, and nothing is accepted that they would ignore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import BatonError
from baton.request import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    Tool,
    ToolCall,
    ToolChoice,
)
from router.chats.chat_abilities import ChatAbilities, argument_name_problem
from router.chats.chat_template import MAX_RENDER_S, ChatTemplate
from router.chats.tool_words import call_names, openai_tools, required_structure
from router.chats.validation_chat import answer_violations, chat_violations
from router.config import ConfigError, RouterConfig
from router.tiny_model import CHAT_TEMPLATE, write_tiny_model
from router.tokenizer import TokenizerError

TOOLS_TEMPLATE = Path(__file__).parents[2] / "deploy/templates/chatml-tools.jinja"
SOURCE = TOOLS_TEMPLATE.read_text(encoding="utf-8")
SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
WEATHER = Tool("get_weather", "The weather of a city, in °C <b>", SCHEMA)
CLOCK = Tool("tell_time")
CALL = ToolCall("call_1", "get_weather", '{"city": "Tromsø"}')
TALK = (
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "Tromsø?"),
    ChatMessage("assistant", "I'll look.", tool_calls=(CALL, ToolCall("call_2", "tell_time", "")), reasoning="hm"),
    ChatMessage("tool", "snow", tool_call_id="call_1"),
    ChatMessage("tool", "noon", tool_call_id="call_2"),
)
ABLE = ChatAbilities(
    has_chat=True,
    knows_tools=True,
    message_fields=frozenset({"tool_calls", "reasoning"}),
    tool_parser="hermes",
    reasoning_parser="qwen3",
    template_argument_names=("enable_thinking", "style"),
)
USER = (ChatMessage("user", "x"),)


def chat(*messages: ChatMessage, **changes: Any) -> ChatPrompt:
    return ChatPrompt(messages or USER, **changes)


def fields(prompt: ChatPrompt, abilities: ChatAbilities = ABLE) -> list[str]:
    return [violation.field for violation in chat_violations(prompt, abilities)]


def said(prompt: ChatPrompt, abilities: ChatAbilities = ABLE) -> str:
    (violation,) = chat_violations(prompt, abilities)
    return f"{violation.field}: {violation.description}"


# Templates


@pytest.mark.parametrize("tools", [(), (WEATHER, CLOCK)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_text_with_tools_equals_that_of_transformers(count: int, tools: tuple[Tool, ...]) -> None:
    template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Tromsø"}}},
        {"id": "call_2", "type": "function", "function": {"name": "tell_time", "arguments": {}}},
    ]
    theirs: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tromsø?"},
        {"role": "assistant", "content": "I'll look.", "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "content": "snow", "tool_call_id": "call_1"},
        {"role": "tool", "content": "noon", "tool_call_id": "call_2"},
    ]
    expected, _ = template_utils.render_jinja_template(
        [theirs[:count]],
        chat_template=SOURCE,
        tools=openai_tools(tools) or None,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    template = ChatTemplate(SOURCE)
    text = template.render(TALK[:count], tools=tools, arguments={"enable_thinking": False}, max_chars=100_000)
    assert text == expected[0]


def test_a_template_is_known_by_what_it_shows() -> None:
    template = ChatTemplate(SOURCE)
    assert template.knows_tools
    assert template.known_message_fields == {"tool_calls", "reasoning"}
    plain = ChatTemplate(CHAT_TEMPLATE)
    assert not plain.knows_tools
    assert plain.known_message_fields == frozenset()
    named = ChatTemplate("{% for m in messages %}{{ m.name or m.role }}: {{ m.content }}{% endfor %}")
    assert named.known_message_fields == {"name"}


def test_a_template_that_only_mentions_tools_does_not_know_them() -> None:
    assert not ChatTemplate("{% if tools %}with tools{% endif %}{{ messages[0].content }}").knows_tools


def test_a_model_with_a_template_of_its_own_for_tools_uses_it(tmp_path: Path) -> None:
    pair = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": pair}))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.knows_tools
    assert template.render(USER, max_chars=100) == "plain"
    assert template.render(USER, tools=(CLOCK,), max_chars=100) == "tell_time"


def test_the_operators_template_takes_the_place_of_the_models(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path)
    template = ChatTemplate.load(model_dir, TOOLS_TEMPLATE)
    assert template is not None
    assert template.knows_tools
    with pytest.raises(TokenizerError, match="chat_template_path"):
        ChatTemplate.load(model_dir, tmp_path / "nowhere.jinja")


def test_arguments_stand_behind_everything_that_is_ours() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ messages[0].content }}{{ add_generation_prompt }}", {"bos_token": "<s>"}
    )
    theirs = {"bos_token": "EVIL", "messages": [{"content": "EVIL"}], "add_generation_prompt": "EVIL"}
    assert template.render(USER, arguments=theirs, max_chars=100) == "<s>xTrue"


def test_rendering_stops_when_it_has_taken_too_long() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}")
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += MAX_RENDER_S / 10
        return now

    with pytest.raises(BatonError, match="template more than"):
        template.render(USER, max_chars=100_000, clock=clock)


def test_what_a_template_says_of_tools_and_calls_never_reaches_an_error() -> None:
    template = ChatTemplate("{{ raise_exception('bad: ' ~ tools ~ messages) }}")
    with pytest.raises(BatonError) as refused:
        template.render(TALK, tools=(Tool("f", "my secret"),), max_chars=1000)
    assert "secret" not in refused.value.violations[0].description
    assert "Troms" not in refused.value.violations[0].description


# Names of arguments


@pytest.mark.parametrize(
    "name", ["messages", "tools", "bos_token", "raise_exception", "range", "loop", "_x", "a-b", ""]
)
def test_no_argument_may_take_the_place_of_what_a_template_gets_from_us(name: str) -> None:
    assert argument_name_problem(name) is not None
    with pytest.raises(ConfigError, match="template_arguments"):
        RouterConfig(model_name="m", model_dir="d", template_arguments=(name,))


def test_a_list_of_names_is_read_from_json_and_toml_alike() -> None:
    base = {"model_name": "m", "model_dir": "d"}
    config = RouterConfig.from_mapping({**base, "template_arguments": ["enable_thinking"]})
    assert config.template_arguments == ("enable_thinking",)
    with pytest.raises(ConfigError, match="a list of strings"):
        RouterConfig.from_mapping({**base, "template_arguments": [1]})


# Validation


def test_a_conversation_with_calls_and_their_answers_is_fine() -> None:
    assert fields(chat(*TALK, tools=(WEATHER, CLOCK), template_arguments_json='{"enable_thinking": true}')) == []


def test_tools_need_a_template_and_a_parser() -> None:
    nothing = ChatAbilities(has_chat=True)
    told = [violation.description for violation in chat_violations(chat(tools=(CLOCK,)), nothing)]
    assert "chat_template_path" in told[0]
    assert "tool_parser" in told[1]
    assert fields(chat(tools=(CLOCK,)), ChatAbilities()) == ["chat"]


@pytest.mark.parametrize(
    ("tool", "field"),
    [
        (Tool(""), "name"),
        (Tool("a b"), "name"),
        (Tool("x" * 65), "name"),
        (Tool("f", "x" * 4097), "description"),
        (Tool("f", "", "[]"), "parameters_json_schema"),
        (Tool("f", "", "{"), "parameters_json_schema"),
        (Tool("f", "", '{"type": "string"}'), "parameters_json_schema"),
        (Tool("f", "", '{"x": NaN}'), "parameters_json_schema"),
        (Tool("f", "", '{"x": "\\ud800"}'), "parameters_json_schema"),
        (Tool("f", "", '{"$defs": []}'), "parameters_json_schema"),
        (Tool("f", "", '{"minItems": 100000}'), "parameters_json_schema"),
        (Tool("f", "", "[" * 100_000), "parameters_json_schema"),
        (Tool("f", "", '{"x": "' + "y" * 65_536 + '"}'), "parameters_json_schema"),
    ],
)
def test_a_tool_that_cannot_be_is_refused_by_its_field(tool: Tool, field: str) -> None:
    assert fields(chat(tools=(CLOCK, tool))) == [f"chat.tools[1].{field}"]


def test_tools_are_counted_and_named_once() -> None:
    assert fields(chat(tools=(CLOCK, CLOCK))) == ["chat.tools[1].name"]
    assert fields(chat(tools=tuple(Tool(f"f{n}") for n in range(129)))) == ["chat.tools"]
    assert fields(chat(tools=tuple(Tool(f"f{n}") for n in range(128)))) == []


def test_what_all_tools_or_all_calls_have_together_is_bounded_before_it_is_read() -> None:
    schema = '{"x": "' + "y" * 60_000 + '"'  # no JSON, which nobody found out
    assert fields(chat(tools=tuple(Tool(f"f{n}", "", schema) for n in range(128)))) == ["chat.tools"]
    many = [ChatMessage("assistant", tool_calls=tuple(ToolCall("", "", "{") for _ in range(128))) for _ in range(9)]
    assert fields(chat(*many)) == ["chat.messages"]
    large = [ChatMessage("assistant", tool_calls=(ToolCall("", "", "{" * 60_000),)) for _ in range(5)]
    assert fields(chat(*large)) == ["chat.messages"]


def test_what_is_bounded_together_is_counted_in_bytes_with_the_ids_of_calls() -> None:
    schema = '{"description": "' + "é" * 30_000 + '"}'
    assert fields(chat(tools=tuple(Tool(f"f{n}", "", schema) for n in range(4)))) == []
    assert fields(chat(tools=tuple(Tool(f"f{n}", "", schema) for n in range(5)))) == ["chat.tools"]

    def called(id_length: int) -> list[ChatMessage]:
        calls = (ToolCall(str(n).rjust(id_length, "0"), "f", '{"x": "' + "é" * 65 + '"}') for n in range(1024))
        return [ChatMessage("assistant", tool_calls=tuple(next(calls) for _ in range(128))) for _ in range(8)]

    assert fields(chat(*called(4))) == []
    assert fields(chat(*called(128))) == ["chat.messages"]


def test_a_choice_must_be_possible() -> None:
    required = ToolChoice.REQUIRED
    assert fields(chat(tool_choice=required)) == ["chat.tool_choice.mode"]
    assert fields(chat(tools=(CLOCK,), tool_name="tell_time")) == ["chat.tool_choice.tool_name"]
    assert fields(chat(tools=(CLOCK,), tool_choice=required, tool_name="other")) == ["chat.tool_choice.tool_name"]
    assert fields(chat(tools=(CLOCK,), tool_choice=required, tool_name="tell_time")) == []


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (ChatMessage("tool", "x"), "tool_call_id"),
        (ChatMessage("tool", "x", tool_call_id="call_9"), "tool_call_id"),
        (ChatMessage("user", "x", tool_call_id="call_1"), "tool_call_id"),
        (ChatMessage("tool", "x", tool_call_id="y" * 129), "tool_call_id"),
        (ChatMessage("user", "x", tool_calls=(ToolCall("call_9", "f", ""),)), "tool_calls"),
        (ChatMessage("assistant", tool_calls=(ToolCall("", "f", ""),)), "tool_calls[0].id"),
        (ChatMessage("assistant", tool_calls=(ToolCall("call_1", "f", ""),)), "tool_calls[0].id"),
        (ChatMessage("assistant", tool_calls=(ToolCall("call_9", "a b", ""),)), "tool_calls[0].name"),
        (ChatMessage("assistant", tool_calls=(ToolCall("call_9", "f", "[]"),)), "tool_calls[0].arguments_json"),
        (ChatMessage("user", "x", reasoning="y"), "reasoning"),
        (ChatMessage("user", "x", name="y"), "name"),
    ],
)
def test_a_message_that_cannot_be_is_refused_by_its_field(message: ChatMessage, field: str) -> None:
    talk = (ChatMessage("user", "x"), ChatMessage("assistant", tool_calls=(CALL,)), message)
    assert fields(chat(*talk)) == [f"chat.messages[2].{field}"]


def test_what_the_template_would_ignore_is_refused_and_says_so() -> None:
    plain = ChatAbilities(has_chat=True)
    for message in (
        ChatMessage("assistant", tool_calls=(CALL,)),
        ChatMessage("assistant", "x", reasoning="y"),
        ChatMessage("user", "x", name="y"),
    ):
        assert "would be ignored" in said(chat(message), plain)


def test_too_many_calls_are_refused_by_their_count() -> None:
    calls = tuple(ToolCall(f"call_{n}", "f", "") for n in range(129))
    assert fields(chat(ChatMessage("assistant", tool_calls=calls))) == ["chat.messages[0].tool_calls"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
        ('{"style": "' + "x" * 5000 + '"}', "at most 4096"),
        ('{"style": "' + "x" * 300 + '"}', "at most 256"),
        ('{"style": 1e9}', "-1,000,000 to 1,000,000"),
        ('{"style": [1]}', "true, false, a number or a string"),
        ('{"style": null}', "true, false, a number or a string"),
        ('{"messages": "x"}', "allowed: enable_thinking, style"),
        ('{"__class__": "x"}', "not allowed"),
    ],
)
def test_template_arguments_are_of_allowed_names_and_small(text: str, part: str) -> None:
    assert part in said(chat(template_arguments_json=text))


def test_a_server_that_allows_no_arguments_says_which_key_would() -> None:
    assert "template_arguments" in said(chat(template_arguments_json='{"x": 1}'), ChatAbilities(has_chat=True))


def test_keeping_the_thinking_in_the_text_needs_somebody_who_takes_it_out() -> None:
    assert fields(chat(keep_reasoning_in_text=True)) == []
    assert "reasoning_parser" in said(chat(keep_reasoning_in_text=True), ChatAbilities(has_chat=True))


# What an answer is held to


def request(prompt: ChatPrompt, **changes: Any) -> list[str]:
    return [violation.field for violation in answer_violations(GenerateRequest(prompt, **changes), ABLE)]


def test_a_required_call_is_a_structure_and_keeps_its_rules() -> None:
    must = chat(tools=(CLOCK,), tool_choice=ToolChoice.REQUIRED)
    regex = Structure(StructureKind.REGEX, "x")
    assert request(must) == []
    assert request(must, sampling=Sampling(structure=regex)) == ["sampling.structure"]
    assert request(must, sampling=Sampling(allowed_token_ids=(1,))) == ["sampling.allowed_token_ids"]
    assert request(must, sampling=Sampling(bad_token_sequences=((1,),))) == ["sampling.bad_token_sequences"]
    assert request(must, stop=StopConditions(ignore_eos=True)) == ["stop.ignore_eos"]
    assert request(must, stop=StopConditions(min_output_token_count=2)) == ["stop.min_output_token_count"]


def test_schemas_that_do_not_fit_into_one_are_refused() -> None:
    long = json.dumps({"type": "object", "description": "x" * 40_000})
    tools = (Tool("a", "", long), Tool("b", "", long))
    assert request(chat(tools=tools, tool_choice=ToolChoice.REQUIRED)) == ["chat.tools"]
    assert request(chat(tools=tools, tool_choice=ToolChoice.REQUIRED, tool_name="a")) == []
    one, other = (json.dumps({"type": "object", "$defs": {"x": {"type": kind}}}) for kind in ("string", "integer"))
    shared = (Tool("a", "", one), Tool("b", "", other))
    assert request(chat(tools=shared, tool_choice=ToolChoice.REQUIRED)) == ["chat.tools"]


def test_a_schema_leaves_no_room_for_thinking_that_would_be_taken_out() -> None:
    schema = Sampling(structure=Structure(StructureKind.JSON_SCHEMA, "{}"))
    assert request(chat(), sampling=schema) == ["sampling.structure.json_schema"]
    assert request(chat(keep_reasoning_in_text=True), sampling=schema) == []
    assert request(chat(), sampling=Sampling(structure=Structure(StructureKind.REGEX, "<think>x</think>y"))) == []


def test_any_tool_is_a_list_of_calls_and_one_tool_its_arguments() -> None:
    any_tool = required_structure(chat(tools=(WEATHER, CLOCK), tool_choice=ToolChoice.REQUIRED))
    assert any_tool is not None
    schema = json.loads(any_tool.text)
    assert (schema["type"], schema["minItems"]) == ("array", 1)
    names = [each["properties"]["name"]["enum"] for each in schema["items"]["anyOf"]]
    assert names == [["get_weather"], ["tell_time"]]
    one = required_structure(chat(tools=(WEATHER,), tool_choice=ToolChoice.REQUIRED, tool_name="get_weather"))
    assert one is not None
    assert json.loads(one.text) == json.loads(SCHEMA)
    nothing = required_structure(chat(tools=(CLOCK,), tool_choice=ToolChoice.REQUIRED, tool_name="tell_time"))
    assert nothing is not None
    assert json.loads(nothing.text)["additionalProperties"] is False
    assert required_structure(chat(tools=(CLOCK,))) is None


def test_definitions_of_all_tools_stand_where_references_find_them() -> None:
    parameters = '{"type": "object", "$defs": {"c": {"type": "string"}}, "properties": {"x": {"$ref": "#/$defs/c"}}}'
    structure = required_structure(chat(tools=(Tool("a", "", parameters),), tool_choice=ToolChoice.REQUIRED))
    assert structure is not None
    assert json.loads(structure.text)["$defs"] == {"c": {"type": "string"}}


def test_calls_are_named_by_prompt_sample_and_place() -> None:
    first = call_names((1, 2, 3), 0)
    assert first(0) == call_names((1, 2, 3), 0)(0)
    assert len({first(0), first(1), call_names((1, 2, 3), 1)(0), call_names((1, 2), 0)(0)}) == 4
