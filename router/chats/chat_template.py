"""A conversation to the text the model was trained on, with the model's own chat template.

Owns the rendering, in the same sandbox and with the same helpers as transformers, so that the text is the same
character for character (tested). The template comes from the model directory or from the operator, never from a
request; of a request come messages, tools and values of arguments that the operator allows. As in transformers, text
of a message that spells a special token becomes that token when tokenised.

What a template knows (tools, calls, thinking, names) is found out once, by rendering small conversations with and
without: what makes no difference there would be ignored in a request, and is refused instead (validation_chat.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import BatonError, FieldViolation, invalid_request
from baton.request import ChatMessage, Tool, ToolCall
from router.chats.tool_words import openai_call, openai_tools
from router.tokenizer import TokenizerError, read_json_object

MAX_RENDER_S = 1.0
"""Of the event loop's time that one conversation may take, looked at with each part that the template writes."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_REASON_CHARS = 200
_MAX_PROBE_CHARS = 100_000
_MARK = "batonprobe"
"""What probing looks for; lower-case letters, which no template changes."""


class _TooLong(Exception):
    """The rendering passed its bound."""


class _TooSlow(Exception):
    """The rendering took too much of the event loop's time."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012  # the base class's declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _words_of(environment: ImmutableSandboxedEnvironment, source: str) -> frozenset[str]:
    """The string constants of a template, such as what it says when it refuses a conversation."""
    constants = environment.parse(source).find_all(jinja2.nodes.Const)
    return frozenset(each.value for each in constants if isinstance(each.value, str))


class ChatTemplate:
    """A compiled template and the special tokens it may name. Immutable; one per process."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        tools_source: str | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """``tools_source``: the template for conversations with tools, where the model has one of its own. ``now``:
        the wall clock that a template may print with ``strftime_now``. Raises ``TokenizerError``."""
        environment = ImmutableSandboxedEnvironment(  # plain text for a model: HTML escaping would be wrong
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            autoescape=False,
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
            self._tools_template = self._template if tools_source is None else environment.from_string(tools_source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"the model's chat template does not compile: {error}") from error
        self.source = source
        self._own_words = _words_of(environment, source) | _words_of(environment, tools_source or "")
        self._special_tokens = dict(special_tokens or {})
        self.knows_tools = self._finds(_TOOL_PROBES)
        """Whether tools show in what it writes."""
        self.known_message_fields = frozenset(name for name, probes in _FIELD_PROBES.items() if self._finds(probes))
        """Which of the optional fields of ``ChatMessage`` show in what it writes: tool_calls, reasoning, name."""

    @classmethod
    def load(cls, model_dir: Path, override: Path | None = None) -> ChatTemplate | None:
        """From ``override``, chat_template.jinja or tokenizer_config.json; None when the model has no template."""
        config = read_json_object(model_dir / "tokenizer_config.json")
        tokens = {**read_json_object(model_dir / "special_tokens_map.json"), **config}
        special_tokens: dict[str, str] = {}
        for name in _SPECIAL_TOKENS:
            value = tokens.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                special_tokens[name] = value
        if override is not None:
            try:
                return cls(override.read_text(encoding="utf-8"), special_tokens)
            except (OSError, UnicodeDecodeError) as error:
                raise TokenizerError(f"chat_template_path {override} cannot be read: {error}") from error
        path = model_dir / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), special_tokens)
        source = _named_template(config.get("chat_template"), "default")
        tools_source = _named_template(config.get("chat_template"), "tool_use")
        return None if source is None else cls(source, special_tokens, tools_source=tools_source)

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        max_chars: int,
        tools: Sequence[Tool] = (),
        arguments: Mapping[str, Any] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> str | None:
        """The prompt text, with the generation prompt added. None when it passes ``max_chars``: rendering stops
        there. ``arguments``: what the template takes besides, by names that were checked. ``clock``: bounds the time;
        without it, nothing does. Raises INVALID_REQUEST, naming the message, when the template refuses the
        conversation, or naming the chat when it takes longer than ``MAX_RENDER_S``."""
        context = self._context(tools, arguments or {})
        try:
            return self._render(messages, context, max_chars, clock)
        except _TooLong:
            return None
        except _TooSlow:
            what = f"takes the model's template more than {MAX_RENDER_S:g} s; shorten the conversation"
            raise invalid_request([FieldViolation("chat", what)]) from None
        except Exception as error:  # a template runs model-supplied code: it may raise anything
            raise self._refusal(messages, context, max_chars, error) from None

    def _context(self, tools: Sequence[Tool], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **arguments,  # first: nothing of a request stands before what is ours
            **self._special_tokens,
            "tools": openai_tools(tools) or None,
            "documents": None,
            "add_generation_prompt": True,
        }

    def _render(
        self,
        messages: Sequence[ChatMessage],
        context: Mapping[str, Any],
        max_chars: int,
        clock: Callable[[], float] | None = None,
    ) -> str:
        parts: list[str] = []
        char_count = 0
        stop_at = None if clock is None else clock() + MAX_RENDER_S
        template = self._tools_template if context["tools"] else self._template
        for part in template.generate({**context, "messages": [_message(each) for each in messages]}):
            char_count += len(part)
            if char_count > max_chars:
                raise _TooLong
            if clock is not None and stop_at is not None and clock() > stop_at:
                raise _TooSlow
            parts.append(part)
        return "".join(parts)

    def _refusal(
        self, messages: Sequence[ChatMessage], context: Mapping[str, Any], max_chars: int, error: Exception
    ) -> BatonError:
        index = self._first_refused(messages, context, max_chars)
        # A template may quote the conversation in whatever form it likes, and prompts never reach error texts: it is
        # repeated only where it says no more than what is written in it.
        said = str(error)[:_MAX_REASON_CHARS] if str(error) in self._own_words else "it cannot render this message"
        return invalid_request(
            [
                FieldViolation(
                    f"chat.messages[{index}]",
                    f"the model's chat template refuses the conversation here: {said}. "
                    "Check its role and its place in the conversation.",
                )
            ]
        )

    def _first_refused(self, messages: Sequence[ChatMessage], context: Mapping[str, Any], max_chars: int) -> int:
        """Index of a message that turns an accepted prefix into a refused one, by bisection."""
        accepted, refused = 0, len(messages)
        while refused - accepted > 1:
            middle = (accepted + refused) // 2
            try:
                self._render(messages[:middle], context, max_chars)
            except _TooLong:
                return middle - 1
            except Exception:
                refused = middle
            else:
                accepted = middle
        return refused - 1

    def _finds(self, probes: Sequence[_Probe]) -> bool:
        """Whether the mark of any of these conversations shows in what the template writes of it."""
        for messages, tools in probes:
            try:
                text = self._render(messages, self._context(tools, {}), _MAX_PROBE_CHARS)
            except Exception:  # noqa: S112  # refused in this form; another may be taken
                continue
            if _MARK in text:
                return True
        return False


_Probe = tuple[Sequence[ChatMessage], Sequence[Tool]]

_USER = ChatMessage("user", "x")
_PROBE_TOOL = Tool(_MARK, "x")
_CALL = ToolCall("abcdefghi", "x", "{}")  # nine characters: some templates insist on them
_ANSWER = ChatMessage("tool", "x", tool_call_id=_CALL.id)
_TOOL_PROBES: Sequence[_Probe] = (
    ((_USER,), (_PROBE_TOOL,)),
    ((ChatMessage("system", "x"), _USER), (_PROBE_TOOL,)),
)
_FIELD_PROBES: Mapping[str, Sequence[_Probe]] = {
    "tool_calls": (
        ((_USER, ChatMessage("assistant", tool_calls=(ToolCall(_CALL.id, _MARK, "{}"),))), ()),
        ((_USER, ChatMessage("assistant", tool_calls=(ToolCall(_CALL.id, _MARK, "{}"),)), _ANSWER), ()),
        ((_USER, ChatMessage("assistant", tool_calls=(ToolCall(_CALL.id, _MARK, "{}"),)), _ANSWER), (Tool("x"),)),
    ),
    "reasoning": (
        ((_USER, ChatMessage("assistant", "x", reasoning=_MARK)), ()),
        ((_USER, ChatMessage("assistant", "x", reasoning=_MARK), _USER), ()),
        ((_USER, ChatMessage("assistant", "x", tool_calls=(_CALL,), reasoning=_MARK), _ANSWER), ()),
        ((_USER, ChatMessage("assistant", "x", tool_calls=(_CALL,), reasoning=_MARK), _ANSWER), (Tool("x"),)),
    ),
    "name": (
        ((ChatMessage("user", "x", name=_MARK),), ()),
        ((_USER, ChatMessage("assistant", "x", name=_MARK)), ()),
        ((_USER, ChatMessage("assistant", tool_calls=(_CALL,)), replace(_ANSWER, name=_MARK)), ()),
        ((_USER, ChatMessage("assistant", tool_calls=(_CALL,)), replace(_ANSWER, name=_MARK)), (Tool("x"),)),
    ),
}


def _message(message: ChatMessage) -> dict[str, Any]:
    """As templates expect it: what is not there has no key, since templates ask whether there is one."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        said["tool_calls"] = [openai_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        said["tool_call_id"] = message.tool_call_id
    if message.reasoning:
        said["reasoning_content"] = said["reasoning"] = message.reasoning  # models differ in the name, as in vLLM
    if message.name:
        said["name"] = message.name
    return said


def _named_template(value: object, name: str) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones: "default", and "tool_use" for tools."""
    if isinstance(value, str):
        return value if name == "default" else None
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == name and isinstance(entry.get("template"), str):
                return str(entry["template"])
    return None


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
