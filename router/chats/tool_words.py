"""Tools and their calls in the shapes that templates, schemas and parsers know: OpenAI's.

Pure. The schema that an answer is held to when a call is required is vLLM's (``get_json_schema_from_tools``), so that
vLLM's parsers read what comes of it.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from baton.request import ChatPrompt, Structure, StructureKind, Tool, ToolCall, ToolChoice

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
"""Of a tool without arguments, as templates are shown it."""


class SharedNameError(ValueError):
    """Two tools define the same name in ``$defs`` in two ways: their schemas cannot stand in one."""


def parameters_of(tool: Tool) -> dict[str, Any]:
    """The schema of its arguments. ``tool`` must have been checked (validation_chat.py)."""
    if not tool.parameters_json_schema:
        return dict(NO_ARGUMENTS)
    schema: dict[str, Any] = json.loads(tool.parameters_json_schema)
    return schema or dict(NO_ARGUMENTS)


def openai_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As templates expect them. A tool without description has no such key: a template may look for it."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                **({"description": tool.description} if tool.description else {}),
                "parameters": parameters_of(tool),
            },
        }
        for tool in tools
    ]


def openai_call(call: ToolCall) -> dict[str, Any]:
    """A call of an earlier turn as templates expect it: its arguments are an object, not text."""
    function = {"name": call.name, "arguments": json.loads(call.arguments_json) if call.arguments_json else {}}
    return {"id": call.id, "type": "function", "function": function}


def _held_to(tool: Tool) -> dict[str, Any]:
    """The schema that a required call's arguments are held to: where a tool has no arguments, none are written."""
    return parameters_of(tool) if tool.parameters_json_schema else {**NO_ARGUMENTS, "additionalProperties": False}


def required_structure(chat: ChatPrompt) -> Structure | None:
    """What an answer that must call is held to; None where nothing must be called.

    A named tool: its arguments, bare. Any tool: a list of at least one {"name": ..., "parameters": ...}. Raises
    ``SharedNameError``.
    """
    if chat.tool_choice is not ToolChoice.REQUIRED:
        return None
    if chat.tool_name:
        schema: dict[str, Any] = next(_held_to(tool) for tool in chat.tools if tool.name == chat.tool_name)
    else:
        definitions: dict[str, Any] = {}
        choices = []
        for tool in chat.tools:
            parameters = _held_to(tool)
            for name, definition in parameters.pop("$defs", {}).items():
                if definitions.setdefault(name, definition) != definition:
                    raise SharedNameError(name)
            choices.append(
                {
                    "properties": {"name": {"type": "string", "enum": [tool.name]}, "parameters": parameters},
                    "required": ["name", "parameters"],
                }
            )
        schema = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": choices}}
        if definitions:
            schema["$defs"] = definitions
    return Structure(StructureKind.JSON_SCHEMA, json.dumps(schema))


def call_names(prompt_token_ids: Sequence[int], sample_index: int) -> Callable[[int], str]:
    """The ids of an answer's calls, by their index. Not drawn: an answer that another router goes on with names its
    calls the same. Unique in a conversation, since each of its answers has another prompt."""
    digest = hashlib.sha256(array("i", prompt_token_ids).tobytes())
    digest.update(b"/%d/" % sample_index)

    def name(index: int) -> str:
        each = digest.copy()
        each.update(b"%d" % index)
        return f"call_{each.hexdigest()[:24]}"

    return name
