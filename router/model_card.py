"""What callers are told of the served model: its limits, its tokens and what requests may ask of it.

Values only. Whoever puts the process together makes the card; ``model_service.py`` shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.request import MAX_SAMPLE_COUNT, MAX_TOP_LOGPROB_COUNT
from router.validation import ModelLimits


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What requests may ask of a model on this server."""

    has_chat: bool = False
    has_tools: bool = False
    tool_parser: str = ""
    """By vLLM's name. Empty: none."""
    reasoning_parser: str = ""
    template_argument_names: tuple[str, ...] = ()
    max_sample_count: int = MAX_SAMPLE_COUNT
    max_top_logprob_count: int = MAX_TOP_LOGPROB_COUNT
    has_resume: bool = False


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model. Made anew for each question: its context may be cut to that of the workers."""

    limits: ModelLimits
    special_tokens: tuple[tuple[int, str], ...] = ()
    """(id, as the tokenizer spells it), by id."""
    chat_template: str = ""
    """Its source; empty: the model takes no chats."""
    capabilities: Capabilities = Capabilities()
