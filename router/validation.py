"""Says everything that is wrong with a request, before it costs anything.

Pure. Owns the public API's ranges; what depends on the model (vocabulary, context) comes in as ``ModelLimits``.
Every broken rule is reported, each with the field, the value, the bound and what to do. Values of text fields
are never repeated, only their sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.errors import FieldViolation, invalid_request, model_not_found, prompt_too_long
from baton.request import (
    MAX_BAD_SEQUENCE_COUNT,
    MAX_BAD_SEQUENCE_LENGTH,
    MAX_BIAS,
    MAX_BIAS_COUNT,
    MAX_CHOICE_COUNT,
    MAX_CHUNK_TOKEN_COUNT,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_STRUCTURE_BYTES,
    MAX_TOP_LOGPROB_COUNT,
    MIN_REPETITION_PENALTY,
    ChatPrompt,
    GenerateRequest,
    OutputOptions,
    Sampling,
    StopConditions,
    StructureKind,
    TextPrompt,
    TokenPrompt,
)
from baton.structures import structure_problem
from router.samples.validation_samples import prompt_output, samples

MAX_TEMPERATURE = 2.0
MAX_STOP_SEQUENCE_COUNT = 16
MAX_STOP_SEQUENCE_BYTES = 256
MAX_STOP_TOKEN_COUNT = 64
MAX_ID_BYTES = 128
MAX_PRIORITY = 100
MAX_SEED = 2**63 - 1
MAX_MESSAGE_COUNT = 1024
MAX_ROLE_BYTES = 64
MAX_TENANT_LENGTH = 64

_REMEDY = {
    StructureKind.JSON_SCHEMA: f"give a JSON object of at most {MAX_STRUCTURE_BYTES} bytes",
    StructureKind.JSON_OBJECT: "give no more than its presence",
    StructureKind.REGEX: f"give an expression of at most {MAX_STRUCTURE_BYTES} bytes with fewer brackets and repeats",
    StructureKind.CHOICE: f"give 1 to {MAX_CHOICE_COUNT} texts, none empty, of {MAX_STRUCTURE_BYTES} bytes at most",
    StructureKind.GRAMMAR: f"give a grammar of at most {MAX_STRUCTURE_BYTES} bytes with fewer brackets and repeats",
}
_TENANT = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_TENANT_LENGTH}}}")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the served model can take."""

    model: str
    vocab_size: int
    max_context_token_count: int
    eos_token_ids: tuple[int, ...] = ()

    @property
    def max_prompt_token_count(self) -> int:
        """One token of the context is for the answer."""
        return self.max_context_token_count - 1


def check(request: GenerateRequest, limits: ModelLimits, also: Sequence[FieldViolation] = ()) -> None:
    """Raises INVALID_REQUEST with every broken rule (``also``: those found while decoding the message),
    MODEL_NOT_FOUND, or PROMPT_TOO_LONG for a token prompt."""
    if request.model and request.model != limits.model:
        raise model_not_found(shown(request.model), [limits.model])
    violations = [*also, *violations_of(request, limits)]
    if violations:
        raise invalid_request(violations)
    if isinstance(request.prompt, TokenPrompt):
        check_prompt_length(len(request.prompt.token_ids), limits)


def check_prompt_length(token_count: int, limits: ModelLimits) -> None:
    """Raises PROMPT_TOO_LONG, or INVALID_REQUEST for a prompt that tokenised to nothing."""
    if token_count == 0:
        raise invalid_request([FieldViolation("prompt", "has no tokens; it must have at least one")])
    if token_count > limits.max_prompt_token_count:
        raise prompt_too_long(token_count, limits.max_prompt_token_count)


def resolved_output_token_count(asked: int | None, prompt_token_count: int, limits: ModelLimits) -> int:
    """How many tokens the answer may have: what was asked for, or what the context has left if that is less."""
    left = limits.max_context_token_count - prompt_token_count
    return left if asked is None else min(asked, left)


def violations_of(request: GenerateRequest, limits: ModelLimits) -> list[FieldViolation]:
    """Every broken rule, in the order of the fields."""
    return [
        *_prompt(request, limits),
        *_sampling(request.sampling),
        *_token_lists(request.sampling, limits),
        *_structure(request),
        *_stop(request.stop, limits),
        *_nothing_left(request, limits),
        *_output(request.output),
        *prompt_output(request),
        *_rest(request),
        *samples(request),
        *_resume(request),
    ]


def _prompt(request: GenerateRequest, limits: ModelLimits) -> Iterator[FieldViolation]:
    match request.prompt:
        case TextPrompt(text):
            if not text:
                yield FieldViolation("prompt", "is empty; set text, token_ids or chat with at least one token")
        case TokenPrompt(token_ids):
            if not token_ids:
                yield FieldViolation("token_ids.ids", "is empty; give at least one token id")
            elif min(token_ids) < 0 or max(token_ids) >= limits.vocab_size:
                yield _outside_vocabulary("token_ids.ids", token_ids, limits)
        case ChatPrompt(messages):
            if not messages:
                yield FieldViolation("chat.messages", "is empty; give at least one message")
            if len(messages) > MAX_MESSAGE_COUNT:
                yield FieldViolation(
                    "chat.messages",
                    f"has {len(messages)} messages; at most {MAX_MESSAGE_COUNT}. Merge or drop old ones.",
                )
            for index, message in enumerate(messages[:MAX_MESSAGE_COUNT]):
                if not message.role:
                    yield FieldViolation(
                        f"chat.messages[{index}].role", 'is empty; say "system", "user" or "assistant"'
                    )
                elif (size := len(message.role.encode())) > MAX_ROLE_BYTES:
                    yield FieldViolation(
                        f"chat.messages[{index}].role", f"has {size} bytes; at most {MAX_ROLE_BYTES}"
                    )


def _sampling(sampling: Sampling) -> Iterator[FieldViolation]:
    # Written as "not inside", so that NaN, which is neither above nor below, is outside.
    if not 0.0 <= sampling.temperature <= MAX_TEMPERATURE:
        yield FieldViolation(
            "sampling.temperature",
            f"is {_number(sampling.temperature)}; must be 0 to {MAX_TEMPERATURE:g}, where 0 is greedy",
        )
    if not 0.0 < sampling.top_p <= 1.0:
        yield FieldViolation(
            "sampling.top_p", f"is {_number(sampling.top_p)}; must be greater than 0 and at most 1, where 1 keeps all"
        )
    if sampling.top_k < 0:
        yield FieldViolation("sampling.top_k", f"is {sampling.top_k}; must be 1 or more, or 0 to keep all")
    if not 0.0 <= sampling.min_p <= 1.0:
        yield FieldViolation("sampling.min_p", f"is {_number(sampling.min_p)}; must be 0 to 1, where 0 drops none")
    if sampling.seed is not None and not 0 <= sampling.seed <= MAX_SEED:
        yield FieldViolation(
            "sampling.seed", f"is {sampling.seed}; must be 0 to {MAX_SEED}, or absent for a draw of its own"
        )

    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        if not -MAX_PENALTY <= value <= MAX_PENALTY:
            yield FieldViolation(
                f"sampling.{name}",
                f"is {_number(value)}; must be {-MAX_PENALTY:g} to {MAX_PENALTY:g}, where 0 is none",
            )
    if not MIN_REPETITION_PENALTY <= sampling.repetition_penalty <= MAX_REPETITION_PENALTY:
        yield FieldViolation(
            "sampling.repetition_penalty",
            f"is {_number(sampling.repetition_penalty)}; must be {MIN_REPETITION_PENALTY:g} to "
            f"{MAX_REPETITION_PENALTY:g}, where 1 is none",
        )


def _token_lists(sampling: Sampling, limits: ModelLimits) -> Iterator[FieldViolation]:
    biased = [token_id for token_id, _ in sampling.logit_bias]
    if len(biased) > MAX_BIAS_COUNT:
        yield FieldViolation(
            "sampling.logit_bias",
            f"has {len(biased)} entries; at most {MAX_BIAS_COUNT}. To leave few tokens, set allowed_token_ids.",
        )
    else:
        if not _are_ids(biased, limits):
            yield _outside_vocabulary("sampling.logit_bias", biased, limits, part=".token_id")
        if len(set(biased)) < len(biased):
            yield FieldViolation("sampling.logit_bias", "names a token twice; add its biases up")
        for index, (_, bias) in enumerate(sampling.logit_bias):
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                yield FieldViolation(
                    f"sampling.logit_bias[{index}].bias",
                    f"is {_number(bias)}; must be {-MAX_BIAS:g} to {MAX_BIAS:g}, where 0 is none",
                )
    allowed = sampling.allowed_token_ids
    if not _are_ids(allowed, limits):
        yield _outside_vocabulary("sampling.allowed_token_ids.ids", allowed, limits)
    elif len(set(allowed)) < len(allowed):
        yield FieldViolation("sampling.allowed_token_ids.ids", "names a token twice; name each once")
    bad = sampling.bad_token_sequences
    if len(bad) > MAX_BAD_SEQUENCE_COUNT:
        yield FieldViolation(
            "sampling.bad_token_sequences", f"has {len(bad)} sequences; at most {MAX_BAD_SEQUENCE_COUNT}"
        )
        return
    for index, sequence in enumerate(bad):
        field = f"sampling.bad_token_sequences[{index}].ids"
        if not 1 <= len(sequence) <= MAX_BAD_SEQUENCE_LENGTH:
            yield FieldViolation(field, f"has {len(sequence)} tokens; must have 1 to {MAX_BAD_SEQUENCE_LENGTH}")
        elif not _are_ids(sequence, limits):
            yield _outside_vocabulary(field, sequence, limits)


def _structure(request: GenerateRequest) -> Iterator[FieldViolation]:
    structure = request.sampling.structure
    if structure is None:
        return
    problem = structure_problem(structure)
    if problem is not None:
        yield FieldViolation(f"sampling.structure.{structure.kind.value}", f"{problem}; {_REMEDY[structure.kind]}")
    # What together could leave an engine no token to draw: it would have to fail, or to break one of the two.
    if request.stop.ignore_eos:
        yield FieldViolation(
            "stop.ignore_eos", "is set with sampling.structure, which ends the answer; leave one out"
        )
    if request.stop.min_output_token_count > 0:
        yield FieldViolation(
            "stop.min_output_token_count",
            "is set with sampling.structure, which may be complete before; put the least length into the structure",
        )
    for name in ("allowed_token_ids", "bad_token_sequences"):
        if getattr(request.sampling, name):
            yield FieldViolation(
                f"sampling.{name}", "is set with sampling.structure; together they may leave no token: leave one out"
            )


def _nothing_left(request: GenerateRequest, limits: ModelLimits) -> Iterator[FieldViolation]:
    """Of the tokens allowed one must be left at every place, whatever came before it."""
    allowed = request.sampling.allowed_token_ids
    left = set(allowed) - {sequence[-1] for sequence in request.sampling.bad_token_sequences if sequence}
    if request.stop.min_output_token_count > 0:
        left -= {*request.stop.stop_token_ids, *limits.eos_token_ids}
    if allowed and not left:
        yield FieldViolation(
            "sampling.allowed_token_ids",
            "may leave no token to draw; allow one that ends none of bad_token_sequences and, with "
            "min_output_token_count, is no stop or end-of-sequence token",
        )


def _stop(stop: StopConditions, limits: ModelLimits) -> Iterator[FieldViolation]:
    if stop.max_output_token_count is not None and stop.max_output_token_count < 1:
        yield FieldViolation(
            "stop.max_output_token_count",
            f"is {stop.max_output_token_count}; must be at least 1, or absent for what the context has left",
        )
    most = limits.max_context_token_count if stop.max_output_token_count is None else stop.max_output_token_count
    if not 0 <= stop.min_output_token_count <= max(1, most):
        what = "the context" if stop.max_output_token_count is None else "max_output_token_count"
        yield FieldViolation(
            "stop.min_output_token_count",
            f"is {stop.min_output_token_count}; must be 0 to {what}, which is {most}",
        )
    if len(stop.stop_sequences) > MAX_STOP_SEQUENCE_COUNT:
        yield FieldViolation(
            "stop.stop_sequences", f"has {len(stop.stop_sequences)} sequences; at most {MAX_STOP_SEQUENCE_COUNT}"
        )
    for index, sequence in enumerate(stop.stop_sequences[:MAX_STOP_SEQUENCE_COUNT]):
        size = len(sequence.encode())
        if not 1 <= size <= MAX_STOP_SEQUENCE_BYTES:
            yield FieldViolation(
                f"stop.stop_sequences[{index}]", f"has {size} bytes; must have 1 to {MAX_STOP_SEQUENCE_BYTES}"
            )
    if len(stop.stop_token_ids) > MAX_STOP_TOKEN_COUNT:
        yield FieldViolation(
            "stop.stop_token_ids", f"has {len(stop.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_COUNT}"
        )
    elif any(not 0 <= token_id < limits.vocab_size for token_id in stop.stop_token_ids):
        yield _outside_vocabulary("stop.stop_token_ids", stop.stop_token_ids, limits)


def _output(output: OutputOptions) -> Iterator[FieldViolation]:
    if output.max_chunk_token_count < 1:
        yield FieldViolation(
            "output.max_chunk_token_count",
            f"is {output.max_chunk_token_count}; must be 1 or more (above {MAX_CHUNK_TOKEN_COUNT} means "
            f"{MAX_CHUNK_TOKEN_COUNT}), or absent for the default",
        )
    if output.top_logprob_count is not None and not 0 <= output.top_logprob_count <= MAX_TOP_LOGPROB_COUNT:
        yield FieldViolation(
            "output.top_logprob_count",
            f"is {output.top_logprob_count}; must be 0 to {MAX_TOP_LOGPROB_COUNT}, or absent for no logprobs",
        )


def _rest(request: GenerateRequest) -> Iterator[FieldViolation]:
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        yield FieldViolation("priority", f"is {request.priority}; must be -{MAX_PRIORITY} to {MAX_PRIORITY}")
    for name, value in (("session_id", request.session_id), ("correlation_id", request.correlation_id)):
        if (size := len(value.encode())) > MAX_ID_BYTES:
            yield FieldViolation(name, f"has {size} bytes; at most {MAX_ID_BYTES}")
    if request.tenant and not _TENANT.fullmatch(request.tenant):
        yield FieldViolation(
            "tenant",
            f"has {len(request.tenant)} characters; must be 1 to {MAX_TENANT_LENGTH} letters, digits or any of _ . -"
            ", or absent",
        )


def _resume(request: GenerateRequest) -> Iterator[FieldViolation]:
    if request.resume is None:
        return
    if request.resume.grace_s is not None and not request.resume.grace_s > 0:
        yield FieldViolation(
            "resume.grace",
            f"is {request.resume.grace_s:g} s; must be more than 0, or absent for the server's default",
        )
    for name, is_asked in (
        ("echo_prompt", request.output.echo_prompt),
        ("prompt_logprob_count", request.output.prompt_logprob_count is not None),
    ):
        if is_asked:
            yield FieldViolation(
                f"output.{name}",
                "cannot be had together with resume: a resumed stream has no prompt part; ask for it "
                "in a request of one token",
            )


def _are_ids(token_ids: Sequence[int], limits: ModelLimits) -> bool:
    return not token_ids or (min(token_ids) >= 0 and max(token_ids) < limits.vocab_size)


def _outside_vocabulary(
    field: str, token_ids: Sequence[int], limits: ModelLimits, *, part: str = ""
) -> FieldViolation:
    outside = [index for index, token_id in enumerate(token_ids) if not 0 <= token_id < limits.vocab_size]
    more = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
    return FieldViolation(
        f"{field}[{outside[0]}]{part}",
        f"is {token_ids[outside[0]]}; must be 0 to {limits.vocab_size - 1}, a token id of {limits.model}{more}",
    )


def _number(value: float) -> str:
    """Short, but never rounded to the bound that it breaks."""
    if math.isnan(value):
        return "not a number"
    return short if float(short := f"{value:g}") == value else repr(value)


def shown(name: str) -> str:
    """A name as an error may repeat it: short and printable."""
    return "".join(char if char.isprintable() else "?" for char in name[:MAX_ID_BYTES])
