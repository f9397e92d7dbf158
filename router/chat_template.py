"""A conversation to the text the model was trained on, with the model's own chat template.

Owns the rendering, in the same sandbox and with the same helpers as transformers, so that the text is the same
character for character (tested). The template comes from the model directory, never from a request. As there, text
of a message that spells a special token becomes that token when tokenised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import BatonError, FieldViolation, invalid_request
from baton.request import ChatMessage
from router.tokenizer import TokenizerError, read_json_object

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_REASON_CHARS = 200


class _TooLong(Exception):
    """The rendering passed its bound."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012  # the base class's declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """A compiled template and the special tokens it may name. Immutable; one per process."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """``now``: the wall clock that a template may print with ``strftime_now``. Raises ``TokenizerError``."""
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
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"the model's chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens or {})
        self.source = source

    @classmethod
    def load(cls, model_dir: Path) -> ChatTemplate | None:
        """From chat_template.jinja or tokenizer_config.json; None when the model has no template."""
        config = read_json_object(model_dir / "tokenizer_config.json")
        tokens = {**read_json_object(model_dir / "special_tokens_map.json"), **config}
        special_tokens: dict[str, str] = {}
        for name in _SPECIAL_TOKENS:
            value = tokens.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                special_tokens[name] = value
        path = model_dir / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else _named_template(config.get("chat_template"))
        return None if source is None else cls(source, special_tokens)

    def render(self, messages: Sequence[ChatMessage], *, max_chars: int) -> str | None:
        """The prompt text, with the generation prompt added. None when it passes ``max_chars``: rendering stops
        there. Raises INVALID_REQUEST, naming the message, when the template refuses the conversation."""
        try:
            return self._render(messages, max_chars)
        except _TooLong:
            return None
        except Exception as error:  # a template runs model-supplied code: it may raise anything
            raise self._refusal(messages, max_chars, error) from None

    def _render(self, messages: Sequence[ChatMessage], max_chars: int) -> str:
        parts: list[str] = []
        char_count = 0
        context: dict[str, Any] = {
            **self._special_tokens,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        for part in self._template.generate(context):
            char_count += len(part)
            if char_count > max_chars:
                raise _TooLong
            parts.append(part)
        return "".join(parts)

    def _refusal(self, messages: Sequence[ChatMessage], max_chars: int, error: Exception) -> BatonError:
        index = self._first_refused(messages, max_chars)
        said = str(error)[:_MAX_REASON_CHARS]
        # A template may quote the conversation, and prompts never reach error texts.
        is_quoting = any(message.content and message.content in str(error) for message in messages)
        if not isinstance(error, jinja2.TemplateError) or isinstance(error, jinja2.UndefinedError) or is_quoting:
            said = "it cannot render this message"
        return invalid_request(
            [
                FieldViolation(
                    f"chat.messages[{index}]",
                    f"the model's chat template refuses the conversation here: {said}. "
                    "Check its role and its place in the conversation.",
                )
            ]
        )

    def _first_refused(self, messages: Sequence[ChatMessage], max_chars: int) -> int:
        """Index of a message that turns an accepted prefix into a refused one, by bisection."""
        accepted, refused = 0, len(messages)
        while refused - accepted > 1:
            middle = (accepted + refused) // 2
            try:
                self._render(messages[:middle], max_chars)
            except _TooLong:
                return middle - 1
            except Exception:
                refused = middle
            else:
                accepted = middle
        return refused - 1


def _named_template(value: object) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones of which "default" is ours."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
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
