"""Says everything that is wrong with a chat, before it costs anything: messages, tools, choice, template arguments.

Pure. What depends on the server comes in as ``ChatAbilities``. As everywhere, each broken rule names the field, the
value (of text: its size), the bound and what to do; names of tools are repeated only if they are well-formed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from baton.errors import FieldViolation
from baton.request import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    Structure,
    StructureKind,
    Tool,
    ToolCall,
    ToolChoice,
)
from baton.structures import structure_problem
from router.chats.chat_abilities import ChatAbilities
from router.chats.tool_words import SharedNameError, required_structure

MAX_TOOL_COUNT = 128
MAX_TOOL_DESCRIPTION_BYTES = 4096
MAX_TOOL_SCHEMA_BYTES = 64 * 1024
MAX_TOOLS_BYTES = 256 * 1024
"""Of all tools together: reading them is the event loop's time."""
MAX_CALL_COUNT = 128
MAX_CHAT_CALL_COUNT = 1024
MAX_CHAT_CALLS_BYTES = 256 * 1024
"""Of the calls of all messages together."""
MAX_CALL_ID_BYTES = 128
MAX_MESSAGE_NAME_BYTES = 64
MAX_ARGUMENTS_BYTES = 4096
MAX_ARGUMENT_TEXT_LENGTH = 256
MAX_ARGUMENT_NUMBER = 1_000_000
"""Either way: a template may count or repeat with it."""
MAX_MESSAGE_COUNT = 1024
"""As in validation.py: what is beyond is reported there, and not looked at here."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME_RULE = "must be 1 to 64 letters, digits, _ or -"
_JSON_KINDS = (StructureKind.JSON_SCHEMA, StructureKind.JSON_OBJECT, StructureKind.CHOICE)


def chat_violations(chat: ChatPrompt, abilities: ChatAbilities) -> list[FieldViolation]:
    """Every broken rule of the conversation itself, in the order of the fields."""
    if not abilities.has_chat:
        return [FieldViolation("chat", "the model has no chat template; send text or token_ids")]
    return [
        *_messages(chat, abilities),
        *_tools(chat, abilities),
        *_choice(chat),
        *_arguments(chat, abilities),
        *_reasoning(chat, abilities),
    ]


def answer_violations(request: GenerateRequest, abilities: ChatAbilities) -> list[FieldViolation]:
    """Every broken rule of what is asked of a chat's answer. Assumes that ``chat_violations`` found none."""
    chat = request.prompt
    if not isinstance(chat, ChatPrompt):
        return []
    return [*_required(chat, request), *_structure_beside_thinking(chat, request, abilities)]


def template_arguments(chat: ChatPrompt) -> dict[str, Any]:
    """The values for the template, of a chat that was checked."""
    return json.loads(chat.template_arguments_json) if chat.template_arguments_json else {}


def _messages(chat: ChatPrompt, abilities: ChatAbilities) -> Iterator[FieldViolation]:
    open_calls: dict[str, int] = {}
    calls = [call for message in chat.messages[:MAX_MESSAGE_COUNT] for call in message.tool_calls]
    size = sum(_byte_count(call.id, call.name, call.arguments_json) for call in calls)
    if len(calls) > MAX_CHAT_CALL_COUNT or size > MAX_CHAT_CALLS_BYTES:
        yield FieldViolation(
            "chat.messages",
            f"have {len(calls)} calls of {size} bytes; at most {MAX_CHAT_CALL_COUNT} of {MAX_CHAT_CALLS_BYTES} "
            "together. Drop old turns.",
        )
        return
    for index, message in enumerate(chat.messages[:MAX_MESSAGE_COUNT]):
        field = f"chat.messages[{index}]"
        for call_index, call in enumerate(message.tool_calls[:MAX_CALL_COUNT]):
            yield from _call(call, f"{field}.tool_calls[{call_index}]", open_calls)
            open_calls[call.id] = index
        yield from _message_calls(message, field, abilities)
        yield from _message_answer(message, field, open_calls)
        if message.reasoning:
            if message.role != "assistant":
                yield FieldViolation(f"{field}.reasoning", "is of the assistant alone; leave it out of other roles")
            elif "reasoning" not in abilities.message_fields:
                yield FieldViolation(
                    f"{field}.reasoning", "would be ignored: the model's template shows no thinking; leave it out"
                )
        if message.name:
            if (size := len(message.name.encode())) > MAX_MESSAGE_NAME_BYTES:
                yield FieldViolation(f"{field}.name", f"has {size} bytes; at most {MAX_MESSAGE_NAME_BYTES}")
            if "name" not in abilities.message_fields:
                yield FieldViolation(
                    f"{field}.name",
                    "would be ignored: the model's template shows no names; leave it out, or say it in the content",
                )


def _message_calls(message: ChatMessage, field: str, abilities: ChatAbilities) -> Iterator[FieldViolation]:
    count = len(message.tool_calls)
    if not count:
        return
    if message.role != "assistant":
        yield FieldViolation(f"{field}.tool_calls", "are the assistant's alone; leave them out of other roles")
    elif "tool_calls" not in abilities.message_fields:
        yield FieldViolation(
            f"{field}.tool_calls",
            "would be ignored: the model's template shows no calls; say them in the content, or have the operator "
            "set chat_template_path to a template that does",
        )
    if count > MAX_CALL_COUNT:
        yield FieldViolation(f"{field}.tool_calls", f"has {count} calls; at most {MAX_CALL_COUNT}")


def _message_answer(message: ChatMessage, field: str, open_calls: Mapping[str, int]) -> Iterator[FieldViolation]:
    size = len(message.tool_call_id.encode())
    if message.role != "tool":
        if size:
            yield FieldViolation(f"{field}.tool_call_id", 'is for messages of role "tool"; leave it out of others')
    elif not size:
        yield FieldViolation(f"{field}.tool_call_id", "is empty; name the call that this message answers")
    elif size > MAX_CALL_ID_BYTES:
        yield FieldViolation(f"{field}.tool_call_id", f"has {size} bytes; at most {MAX_CALL_ID_BYTES}")
    elif message.tool_call_id not in open_calls:
        yield FieldViolation(
            f"{field}.tool_call_id", "answers no call of a message before it; send the assistant's calls along"
        )


def _call(call: ToolCall, field: str, known: Mapping[str, int]) -> Iterator[FieldViolation]:
    size = len(call.id.encode())
    if not 1 <= size <= MAX_CALL_ID_BYTES:
        yield FieldViolation(f"{field}.id", f"has {size} bytes; must have 1 to {MAX_CALL_ID_BYTES}")
    elif call.id in known:
        yield FieldViolation(f"{field}.id", "is the id of an earlier call, too; ids are unique in a conversation")
    if not _NAME.fullmatch(call.name):
        yield FieldViolation(f"{field}.name", f"{_NAME_RULE}, as the tool's")
    if call.arguments_json:
        problem = _object_problem(call.arguments_json, MAX_TOOL_SCHEMA_BYTES)
        if problem is not None:
            yield FieldViolation(f"{field}.arguments_json", f"{problem}; give the arguments as a JSON object")


def _tools(chat: ChatPrompt, abilities: ChatAbilities) -> Iterator[FieldViolation]:
    count = len(chat.tools)
    if not count:
        return
    if not abilities.knows_tools:
        yield FieldViolation(
            "chat.tools",
            "would be ignored: the model's template shows no tools; leave them out, or have the operator set "
            "chat_template_path to a template that does",
        )
    if not abilities.tool_parser:
        yield FieldViolation(
            "chat.tools",
            "cannot be called: this server has no tool parser for the model; leave them out, or have the operator "
            "set tool_parser",
        )
    if count > MAX_TOOL_COUNT:
        yield FieldViolation("chat.tools", f"has {count} tools; at most {MAX_TOOL_COUNT}")
    size = sum(_byte_count(tool.name, tool.description, tool.parameters_json_schema) for tool in chat.tools)
    if size > MAX_TOOLS_BYTES:
        yield FieldViolation(
            "chat.tools", f"have {size} bytes together; at most {MAX_TOOLS_BYTES}. Shorten them, or give fewer."
        )
        return
    names: set[str] = set()
    for index, tool in enumerate(chat.tools[:MAX_TOOL_COUNT]):
        yield from _tool(tool, f"chat.tools[{index}]", names)
        names.add(tool.name)


def _tool(tool: Tool, field: str, names: set[str]) -> Iterator[FieldViolation]:
    if not _NAME.fullmatch(tool.name):
        yield FieldViolation(f"{field}.name", _NAME_RULE)
    elif tool.name in names:
        yield FieldViolation(f"{field}.name", f"{tool.name} is the name of an earlier tool, too; name each once")
    if (size := len(tool.description.encode())) > MAX_TOOL_DESCRIPTION_BYTES:
        yield FieldViolation(f"{field}.description", f"has {size} bytes; at most {MAX_TOOL_DESCRIPTION_BYTES}")
    if tool.parameters_json_schema:
        text = tool.parameters_json_schema
        problem = _object_problem(text, MAX_TOOL_SCHEMA_BYTES)
        # The same bounds as of a structure: with REQUIRED, it becomes one.
        problem = problem or structure_problem(Structure(StructureKind.JSON_SCHEMA, text))
        if problem is None and json.loads(text).get("type", "object") != "object":
            problem = 'describes no object ("type" is another)'
        if problem is None and not isinstance(json.loads(text).get("$defs", {}), dict):
            problem = "has $defs that are no JSON object"
        if problem is not None:
            yield FieldViolation(
                f"{field}.parameters_json_schema",
                f"{problem}; give a JSON schema of an object, of at most {MAX_TOOL_SCHEMA_BYTES} bytes, or leave it "
                "empty for no arguments",
            )


def _choice(chat: ChatPrompt) -> Iterator[FieldViolation]:
    if chat.tool_choice is ToolChoice.REQUIRED and not chat.tools:
        yield FieldViolation("chat.tool_choice.mode", "is REQUIRED without tools; give tools, or leave it out")
    if not chat.tool_name:
        return
    if chat.tool_choice is not ToolChoice.REQUIRED:
        yield FieldViolation("chat.tool_choice.tool_name", "is set without REQUIRED; set mode, or leave it out")
    elif chat.tools and chat.tool_name not in {tool.name for tool in chat.tools}:
        yield FieldViolation(
            "chat.tool_choice.tool_name", f"is none of the {len(chat.tools)} tools; give the name of one of them"
        )


def _arguments(chat: ChatPrompt, abilities: ChatAbilities) -> Iterator[FieldViolation]:
    text, field = chat.template_arguments_json, "chat.template_arguments_json"
    if not text:
        return
    problem = _object_problem(text, MAX_ARGUMENTS_BYTES)
    if problem is not None:
        yield FieldViolation(field, f"{problem}; give a JSON object of at most {MAX_ARGUMENTS_BYTES} bytes")
        return
    allowed = abilities.template_argument_names
    for name, value in json.loads(text).items():
        if name not in allowed:
            shown = f'"{name}"' if _NAME.fullmatch(name) else "a name"
            may = f"allowed: {', '.join(allowed)}" if allowed else "this server allows none (template_arguments)"
            yield FieldViolation(field, f"has {shown} that is not allowed; {may}")
        elif (value_problem := _value_problem(value)) is not None:
            yield FieldViolation(f"{field}.{name}", value_problem)


def _value_problem(value: Any) -> str | None:
    if isinstance(value, str):
        if len(value) > MAX_ARGUMENT_TEXT_LENGTH:
            return f"has {len(value)} characters; at most {MAX_ARGUMENT_TEXT_LENGTH}"
    elif isinstance(value, bool):
        return None
    elif isinstance(value, int | float):
        if not -MAX_ARGUMENT_NUMBER <= value <= MAX_ARGUMENT_NUMBER:  # NaN, too, is not inside
            return f"must be {-MAX_ARGUMENT_NUMBER:,} to {MAX_ARGUMENT_NUMBER:,}"
    else:
        return "must be true, false, a number or a string"
    return None


def _reasoning(chat: ChatPrompt, abilities: ChatAbilities) -> Iterator[FieldViolation]:
    if chat.keep_reasoning_in_text and not abilities.reasoning_parser:
        yield FieldViolation(
            "chat.keep_reasoning_in_text",
            "changes nothing: this server takes no thinking out of the text (no reasoning_parser); leave it out",
        )


def _required(chat: ChatPrompt, request: GenerateRequest) -> Iterator[FieldViolation]:
    """A call that must be made is made by holding the answer to a structure: its rules are those of one."""
    if chat.tool_choice is not ToolChoice.REQUIRED:
        return
    try:
        structure = required_structure(chat)
    except SharedNameError:
        yield FieldViolation(
            "chat.tools", "define one name in $defs in two ways, which REQUIRED cannot tell apart; rename one"
        )
        return
    problem = None if structure is None else structure_problem(structure)
    if problem is not None:
        yield FieldViolation(
            "chat.tools",
            f"cannot all be held to with REQUIRED: their schemas together {problem}; shorten them, give fewer tools, "
            "or name the one tool that must be called",
        )
    clashes = {
        "sampling.structure": request.sampling.structure is not None,
        "sampling.allowed_token_ids": bool(request.sampling.allowed_token_ids),
        "sampling.bad_token_sequences": bool(request.sampling.bad_token_sequences),
        "stop.ignore_eos": request.stop.ignore_eos,
        "stop.min_output_token_count": request.stop.min_output_token_count > 0,
    }
    for field, is_set in clashes.items():
        if is_set:
            yield FieldViolation(
                field, "is set with tool_choice REQUIRED, which holds the answer to the tools' schemas; leave one out"
            )


def _structure_beside_thinking(
    chat: ChatPrompt, request: GenerateRequest, abilities: ChatAbilities
) -> Iterator[FieldViolation]:
    structure = request.sampling.structure
    if structure is None or not abilities.reasoning_parser or chat.keep_reasoning_in_text:
        return
    if structure.kind in _JSON_KINDS:
        yield FieldViolation(
            f"sampling.structure.{structure.kind.value}",
            "holds the whole answer, and leaves no room for the thinking that this server takes out of the text: set "
            "chat.keep_reasoning_in_text, or give a regex or grammar of thinking and answer together",
        )


def _object_problem(text: str, max_bytes: int) -> str | None:
    """What is wrong with a text that must be a JSON object, or None."""
    if (size := len(text.encode())) > max_bytes:
        return f"has {size} bytes; at most {max_bytes}"
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "has half a surrogate pair, which is no character"
    except (ValueError, RecursionError):
        return "is not JSON"
    return None if isinstance(value, dict) else "is not a JSON object"


def _byte_count(*texts: str) -> int:
    return sum(len(text.encode()) for text in texts)


def _refuse_constant(name: str) -> None:
    """NaN and Infinity are Python's, not JSON's."""
    raise ValueError(name)
