"""The words of a request, shared by every room: what is asked, never how it is carried.

Plain frozen dataclasses. Protobuf messages become these in the ``service.py`` files and nowhere
else. The constructors check nothing that depends on a model; ``problems`` functions say what is wrong
with a field in terms an API caller understands.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

MAX_TOP_LOGPROB_COUNT = 20
MAX_CHUNK_TOKEN_COUNT = 1024
MAX_BIAS_COUNT = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0
"""Of presence and frequency, either way."""
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100.0
MAX_BAD_SEQUENCE_COUNT = 64
MAX_BAD_SEQUENCE_LENGTH = 16
"""Tokens."""
MAX_STRUCTURE_BYTES = 64 * 1024
"""Of a schema, expression or grammar, or of all choices together, in UTF-8."""
MAX_CHOICE_COUNT = 256
MAX_TENANT_BYTES = 128
MAX_SAMPLE_COUNT = 16


class FinishReason(enum.Enum):
    """Why an answer ended."""

    STOP = "stop"
    """End-of-sequence token, stop token or stop sequence."""
    MAX_OUTPUT_TOKENS = "max_output_tokens"
    CONTEXT_FULL = "context_full"
    TOOL_CALLS = "tool_calls"
    """The model called tools, and waits for what they say."""


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


class Handover(enum.Enum):
    """How tokens that another engine had drawn reached the engine that decoded last."""

    NONE = "none"
    """There were none: it drew every token itself, or no decode was needed."""
    OUTPUT_INJECTION = "output_injection"
    """As output that it has generated already."""


class StructureKind(enum.Enum):
    """What an answer's text must match; the engine masks every token that cannot."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Structure:
    """``text`` is the schema (JSON), expression or grammar (Lark or GBNF); ``choices`` serves CHOICE alone."""

    kind: StructureKind
    text: str = field(default="", repr=False)
    choices: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn. The defaults are greedy and unrestricted."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    """Taken off the logit of each token that the answer has already; -2 to 2."""
    frequency_penalty: float = 0.0
    """The same once per occurrence; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, if negative) the logits of tokens of prompt and answer; 0.01 to 100, 1 is none."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit), -100 to 100."""
    allowed_token_ids: tuple[int, ...] = ()
    """Empty: all."""
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    """Never completed in the answer."""
    structure: Structure | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class EngineStop:
    """When an engine stops by itself. Stop *sequences* are text, hence the router's business."""

    max_token_count: int
    """Tokens this leg may still generate."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_token_count: int = 0
    """Of the whole answer: no end or stop token is drawn before, tokens that earlier legs emitted included."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made. ``arguments_json``: a JSON object, as the model wrote it."""

    id: str
    name: str
    arguments_json: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of one call; the pieces of a call, joined in order, are the call. ``id`` and ``name`` come in its first
    piece."""

    index: int
    """Which of the answer's calls, from 0."""
    id: str = ""
    name: str = ""
    arguments_json: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str = field(default="", repr=False)
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """Which call a message of role "tool" answers."""
    reasoning: str = field(default="", repr=False)
    """The thinking before an assistant's message, for templates that take it."""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. ``parameters_json_schema``: a JSON object, or empty for no arguments."""

    name: str
    description: str = field(default="", repr=False)
    parameters_json_schema: str = field(default="", repr=False)


class ToolChoice(enum.Enum):
    """Whether the model may or must call tools."""

    AUTO = "auto"
    NONE = "none"
    """Tools are shown, calls are left as text."""
    REQUIRED = "required"
    """At least one call; the answer is held to the tools' schemas."""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str = field(repr=False)  # prompts never reach logs


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    messages: tuple[ChatMessage, ...] = field(repr=False)
    tools: tuple[Tool, ...] = field(default=(), repr=False)
    tool_choice: ToolChoice = ToolChoice.AUTO
    tool_name: str = ""
    """With REQUIRED: the one tool that must be called. Empty: any."""
    template_arguments_json: str = field(default="", repr=False)
    """A JSON object of values that the template takes besides the messages; only names that the server allows."""
    keep_reasoning_in_text: bool = False


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When generation ends, as the caller asked. ``None``: what the context has left."""

    max_output_token_count: int | None = None
    stop_sequences: tuple[str, ...] = field(default=(), repr=False)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_output_token_count: int = 0
    """Before, no end or stop token is drawn and no stop sequence complete by then is minded."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    wants_text: bool = True
    wants_token_ids: bool = False
    max_chunk_token_count: int = 64
    """More than ``MAX_CHUNK_TOKEN_COUNT`` mean as many."""
    top_logprob_count: int | None = None
    """None: no logprobs. 0: of the tokens drawn. More: also of so many likeliest."""
    echo_prompt: bool = False
    """Send the prompt as the model read it, ahead of the answer."""
    prompt_logprob_count: int | None = None
    """Of the prompt's tokens, as ``top_logprob_count`` is of the answer's."""


@dataclass(frozen=True, slots=True)
class ResumeOptions:
    """The generation outlives a cut connection. ``grace_s``: for how long; None: the server's default."""

    grace_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities, of one drawn token and of the likeliest at its place."""

    logprob: float
    rank: int
    """1 is the likeliest."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), likeliest first."""


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
    tenant: str = ""
    """Whose request it is: KV is shared, cached and handed over within a tenant only. Empty: the common one."""
    sample_count: int = 1
    """Answers to draw; they share one prefill. With a seed, sample i is drawn with seed + i."""
    resume: ResumeOptions | None = None
    """Present: a cut connection does not end the generation."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_token_count: int
    output_token_count: int
    cached_prompt_token_count: int
