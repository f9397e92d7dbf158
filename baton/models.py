"""What a Baton serves, as callers see it. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that is not text."""

    token_id: int
    text: str
    """As the tokenizer spells it."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What requests may ask of a model on this server."""

    has_chat: bool = False
    has_tools: bool = False
    tool_parser: str = ""
    """By vLLM's name. Empty: none."""
    reasoning_parser: str = ""
    template_argument_names: tuple[str, ...] = ()
    max_sample_count: int = 1
    max_top_logprob_count: int = 0
    has_resume: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A served model."""

    name: str
    max_context_token_count: int
    """That prompt and answer may have together."""
    vocab_size: int
    """Token ids are 0 to this less one."""
    special_tokens: tuple[SpecialToken, ...] = ()
    end_token_ids: tuple[int, ...] = ()
    chat_template: str = field(default="", repr=False)
    """Jinja source. Empty: the model takes no chats."""
    capabilities: Capabilities = Capabilities()


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens that a prompt would have, and that one may have."""

    token_count: int
    max_prompt_token_count: int

    @property
    def fits(self) -> bool:
        return self.token_count <= self.max_prompt_token_count
