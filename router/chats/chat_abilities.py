"""What chats may ask of this server: one value, made when the router starts, and asked by whoever needs to know.

Values and the rules of template arguments; no behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RESERVED_ARGUMENT_NAMES = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace"),
        *("loop", "self", "varargs", "kwargs", "caller", "true", "false", "none", "True", "False", "None"),
        *("chat_template", "tokenize", "conversation", "return_dict", "template"),
    }
)
"""What templates get from us, from Jinja or from transformers: an argument of that name would take its place."""
MAX_ARGUMENT_NAME_LENGTH = 64
MAX_ARGUMENT_NAMES = 32


def argument_name_problem(name: str) -> str | None:
    """What is wrong with a name that an operator would allow, or None."""
    if not name.isidentifier() or name.startswith("_") or len(name) > MAX_ARGUMENT_NAME_LENGTH:
        return f"must be a name of at most {MAX_ARGUMENT_NAME_LENGTH} letters, digits and _, not beginning with _"
    if name in RESERVED_ARGUMENT_NAMES:
        return "would take the place of what the template gets from Baton or Jinja"
    return None


@dataclass(frozen=True, slots=True)
class ChatAbilities:
    """Of the one model that is served."""

    has_chat: bool = False
    """There is a template."""
    knows_tools: bool = False
    """The template shows tools to the model."""
    message_fields: frozenset[str] = frozenset()
    """Of ``ChatMessage``: tool_calls, reasoning, name; those that the template shows to the model."""
    tool_parser: str = ""
    """By vLLM's name. Empty: none."""
    reasoning_parser: str = ""
    """By vLLM's name. Empty: none."""
    template_argument_names: Sequence[str] = ()

    @property
    def has_tools(self) -> bool:
        """Whether requests may bring tools."""
        return self.knows_tools and bool(self.tool_parser)
