"""The words of a request, shared by every room: what is asked, never how it is carried.

Plain frozen dataclasses. Protobuf messages become these in the ``service.py`` files and nowhere
else. The constructors check nothing that depends on a model; ``problems`` functions say what is wrong
with a field in terms an API caller understands.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class FinishReason(enum.Enum):
    """Why an answer ended."""

    STOP = "stop"
    """End-of-sequence token, stop token or stop sequence."""
    MAX_OUTPUT_TOKENS = "max_output_tokens"
    CONTEXT_FULL = "context_full"


class LegFinish(enum.Enum):
    """Why one leg (a prefill or a decode) ended. The router turns it into a ``FinishReason``."""

    STOP = "stop"
    LENGTH = "length"


class Role(enum.Enum):
    """Which phase the router places on a worker. A decision, not a property of the process."""

    PREFILL = "prefill"
    DECODE = "decode"


class PlacementMode(enum.Enum):
    """How the phases of a request were placed."""

    SPLIT = "split"
    LOCAL = "local"
    PREFILL_ONLY = "prefill_only"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn. The defaults are greedy and unrestricted."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class EngineStop:
    """When an engine stops by itself. Stop *sequences* are text, hence the router's business."""

    max_token_count: int
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str = field(repr=False)  # prompts never reach logs


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    messages: tuple[ChatMessage, ...] = field(repr=False)


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When generation ends, as the caller asked. ``None``: what the context has left."""

    max_output_token_count: int | None = None
    stop_sequences: tuple[str, ...] = field(default=(), repr=False)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class OutputOptions:
    wants_text: bool = True
    wants_token_ids: bool = False
    max_chunk_token_count: int = 64


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One public request, decoded and field-checked but not yet tokenised."""

    prompt: Prompt
    model: str = ""
    sampling: Sampling = Sampling()
    stop: StopConditions = StopConditions()
    output: OutputOptions = OutputOptions()
    priority: int = 0
    session_id: str = ""
    correlation_id: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_token_count: int
    output_token_count: int
    cached_prompt_token_count: int
