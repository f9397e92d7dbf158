"""What callers write as a prompt, in the words of ``baton.request``. Pure.

A message is a ``ChatMessage``, a pair ``("user", "Hello!")``, or a mapping with the fields of ``ChatMessage``; a
tool is a ``Tool``, or a mapping with name, description and parameters (a JSON schema as a mapping), also inside the
``{"type": "function", "function": ...}`` that other APIs put around it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from baton.request import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt, Tool, ToolCall, ToolChoice

MessageLike = ChatMessage | tuple[str, str] | Mapping[str, Any]
ToolLike = Tool | Mapping[str, Any]
TemplateArgument = str | int | float | bool

_MESSAGE_FIELDS = tuple(field.name for field in dataclasses.fields(ChatMessage))
_CALL_FIELDS = tuple(field.name for field in dataclasses.fields(ToolCall))
_TOOL_FIELDS = ("name", "description", "parameters")


def prompt_of(prompt: str | Sequence[int] | Prompt) -> Prompt:
    match prompt:
        case str():
            return TextPrompt(prompt)
        case TextPrompt() | TokenPrompt() | ChatPrompt():
            return prompt
        case _:
            return TokenPrompt(tuple(prompt))


def chat_prompt(
    messages: Sequence[MessageLike],
    *,
    tools: Sequence[ToolLike] = (),
    tool_choice: ToolChoice | str = ToolChoice.AUTO,
    tool_name: str = "",
    template_arguments: Mapping[str, TemplateArgument] | None = None,
    keep_reasoning_in_text: bool = False,
) -> ChatPrompt:
    """``tool_choice``: "auto", "none" or "required"; ``tool_name``: the one tool required. Raises ValueError for
    what is no message, tool or choice."""
    return ChatPrompt(
        messages=tuple(message_of(message) for message in messages),
        tools=tuple(tool_of(tool) for tool in tools),
        tool_choice=ToolChoice(tool_choice),
        tool_name=tool_name,
        template_arguments_json=json.dumps(dict(template_arguments), allow_nan=False) if template_arguments else "",
        keep_reasoning_in_text=keep_reasoning_in_text,
    )


def message_of(message: MessageLike) -> ChatMessage:
    match message:
        case ChatMessage():
            return message
        case Mapping():
            given = _known("a message", message, _MESSAGE_FIELDS)
            calls = tuple(
                call if isinstance(call, ToolCall) else ToolCall(**_known("a tool call", call, _CALL_FIELDS))
                for call in given.pop("tool_calls", None) or ()
            )
            return ChatMessage(**{**given, "content": given.get("content") or "", "tool_calls": calls})
        case (str() as role, str() as content):
            return ChatMessage(role, content)
    raise ValueError(f"a message is a ChatMessage, a pair (role, content) or a mapping, not {type(message).__name__}")


def tool_of(tool: ToolLike) -> Tool:
    if isinstance(tool, Tool):
        return tool
    if set(tool) == {"type", "function"}:
        tool = tool["function"]
    given = _known("a tool", tool, _TOOL_FIELDS)
    parameters = given.get("parameters")
    return Tool(
        given["name"], given.get("description") or "", json.dumps(parameters, allow_nan=False) if parameters else ""
    )


def _known(what: str, given: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Says the names alone: what is under them may be somebody's prompt."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} is a mapping with {', '.join(names)}, not {type(given).__name__}")
    unknown = sorted(str(name) for name in given if name not in names)
    if unknown:
        raise ValueError(f"{what} has no {', '.join(unknown)}; it has {', '.join(names)}")
    if names[0] not in given:
        raise ValueError(f"{what} needs {names[0]}")
    return dict(given)
