"""Requests as messages of the public API, both ways: for clients, for the router, and for fakes of it.

Mechanical: defaults are filled in, presence becomes None; ranges are the server's to check, but for one end
that is no error.
"""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from baton.errors import FieldViolation
from baton.request import (
    MAX_CHUNK_TOKEN_COUNT,
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    OutputOptions,
    Prompt,
    ResumeOptions,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
    ToolChoice,
)
from baton.v1 import generation_pb2 as pb

_TOOL_CHOICES = {
    pb.ToolChoice.MODE_UNSPECIFIED: ToolChoice.AUTO,
    pb.ToolChoice.MODE_AUTO: ToolChoice.AUTO,
    pb.ToolChoice.MODE_NONE: ToolChoice.NONE,
    pb.ToolChoice.MODE_REQUIRED: ToolChoice.REQUIRED,
}
_CONTENTS = {
    pb.OutputOptions.CONTENT_UNSPECIFIED: (True, False),
    pb.OutputOptions.CONTENT_TEXT: (True, False),
    pb.OutputOptions.CONTENT_TOKEN_IDS: (False, True),
    pb.OutputOptions.CONTENT_BOTH: (True, True),
}
_MODES_OF_CHOICE = {
    ToolChoice.AUTO: pb.ToolChoice.MODE_AUTO,
    ToolChoice.NONE: pb.ToolChoice.MODE_NONE,
    ToolChoice.REQUIRED: pb.ToolChoice.MODE_REQUIRED,
}


def request_to_proto(
    prompt: Prompt,
    *,
    model: str = "",
    sampling: Sampling | None = None,
    stop: StopConditions | None = None,
    output: OutputOptions | None = None,
    priority: int = 0,
    session_id: str = "",
    correlation_id: str = "",
    tenant: str = "",
    sample_count: int = 1,
    resume: ResumeOptions | None = None,
) -> pb.GenerateRequest:
    """The message. Raises ``ValueError`` for numbers that no message can carry."""
    message = pb.GenerateRequest(
        model=model,
        priority=priority,
        session_id=session_id,
        correlation_id=correlation_id,
        tenant=tenant,
        sample_count=0 if sample_count == 1 else sample_count,  # as absent as it was to older servers
    )
    if resume is not None:
        message.resume.SetInParent()
        if resume.grace_s is not None:
            message.resume.grace.CopyFrom(_duration(resume.grace_s))
    match prompt:
        case TextPrompt(text):
            message.text = text
        case TokenPrompt(token_ids):
            message.token_ids.ids.extend(token_ids)
            message.token_ids.SetInParent()
        case ChatPrompt():
            message.chat.CopyFrom(chat_to_proto(prompt))
            message.chat.SetInParent()
    if sampling is not None:
        message.sampling.CopyFrom(
            pb.Sampling(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=sampling.seed,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                repetition_penalty=sampling.repetition_penalty,
                logit_bias=[pb.TokenBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
                allowed_token_ids=(
                    pb.TokenIds(ids=sampling.allowed_token_ids) if sampling.allowed_token_ids else None
                ),
                bad_token_sequences=[pb.TokenIds(ids=each) for each in sampling.bad_token_sequences],
                structure=None if sampling.structure is None else _structure_to_proto(sampling.structure),
            )
        )
    if stop is not None:
        message.stop.CopyFrom(
            pb.StopConditions(
                max_output_token_count=stop.max_output_token_count,
                stop_sequences=stop.stop_sequences,
                stop_token_ids=stop.stop_token_ids,
                ignore_eos=stop.ignore_eos,
                min_output_token_count=stop.min_output_token_count,
            )
        )
    if output is not None:
        message.output.CopyFrom(
            pb.OutputOptions(
                content={
                    (True, True): pb.OutputOptions.CONTENT_BOTH,
                    (False, True): pb.OutputOptions.CONTENT_TOKEN_IDS,
                }.get((output.wants_text, output.wants_token_ids), pb.OutputOptions.CONTENT_TEXT),
                max_chunk_token_count=output.max_chunk_token_count,
                top_logprob_count=output.top_logprob_count,
                echo_prompt=output.echo_prompt,
                prompt_logprob_count=output.prompt_logprob_count,
            )
        )
    return message


def _structure_to_proto(structure: Structure) -> pb.StructuredOutput:
    match structure.kind:
        case StructureKind.JSON_SCHEMA:
            return pb.StructuredOutput(json_schema=structure.text)
        case StructureKind.JSON_OBJECT:
            return pb.StructuredOutput(json_object=pb.JsonObject())
        case StructureKind.REGEX:
            return pb.StructuredOutput(regex=structure.text)
        case StructureKind.CHOICE:
            return pb.StructuredOutput(choice=pb.Choices(texts=structure.choices))
        case StructureKind.GRAMMAR:
            return pb.StructuredOutput(grammar=structure.text)


def chat_to_proto(prompt: ChatPrompt) -> pb.Chat:
    message = pb.Chat(
        messages=[
            pb.ChatMessage(
                role=each.role,
                content=each.content,
                tool_calls=[
                    pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)
                    for call in each.tool_calls
                ],
                tool_call_id=each.tool_call_id,
                reasoning=each.reasoning,
                name=each.name,
            )
            for each in prompt.messages
        ],
        tools=[
            pb.Tool(
                name=each.name,
                description=each.description,
                parameters_json_schema=each.parameters_json_schema,
            )
            for each in prompt.tools
        ],
        template_arguments_json=prompt.template_arguments_json,
        keep_reasoning_in_text=prompt.keep_reasoning_in_text,
    )
    if prompt.tool_choice is not ToolChoice.AUTO or prompt.tool_name:
        message.tool_choice.mode = _MODES_OF_CHOICE[prompt.tool_choice]
        message.tool_choice.tool_name = prompt.tool_name
    return message


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def request_from_proto(message: pb.GenerateRequest) -> tuple[GenerateRequest, list[FieldViolation]]:
    """The request, and what could not be expressed in it: an unknown output content, a list that is there and has
    nothing in it, a structure of no kind."""
    violations = []
    contents = _CONTENTS.get(message.output.content)
    if contents is None:
        violations.append(
            FieldViolation("output.content", f"is {message.output.content}; must be a value of OutputOptions.Content")
        )
    wants_text, wants_token_ids = contents or (True, False)
    if message.sampling.HasField("allowed_token_ids") and not message.sampling.allowed_token_ids.ids:
        violations.append(
            FieldViolation(
                "sampling.allowed_token_ids", "is empty; give at least one token id, or leave it out for all"
            )
        )
    if message.sampling.HasField("structure") and message.sampling.structure.WhichOneof("kind") is None:
        kinds = ", ".join(field.name for field in pb.StructuredOutput.DESCRIPTOR.fields)
        violations.append(FieldViolation("sampling.structure", f"is of no kind; set one of {kinds}, or leave it out"))
    default = OutputOptions()
    request = GenerateRequest(
        prompt=_prompt_from_proto(message, violations),
        model=message.model,
        sampling=_sampling_from_proto(message.sampling),
        stop=StopConditions(
            max_output_token_count=(
                message.stop.max_output_token_count if message.stop.HasField("max_output_token_count") else None
            ),
            stop_sequences=tuple(message.stop.stop_sequences),
            stop_token_ids=tuple(message.stop.stop_token_ids),
            ignore_eos=message.stop.ignore_eos,
            min_output_token_count=message.stop.min_output_token_count,
        ),
        output=OutputOptions(
            wants_text=wants_text,
            wants_token_ids=wants_token_ids,
            # More is no mistake, the field once had no end; but nothing on the way may hold more for one chunk. The
            # message stays as it was sent: continuations are sealed over it.
            max_chunk_token_count=(
                min(message.output.max_chunk_token_count, MAX_CHUNK_TOKEN_COUNT)
                if message.output.HasField("max_chunk_token_count")
                else default.max_chunk_token_count
            ),
            top_logprob_count=(
                message.output.top_logprob_count if message.output.HasField("top_logprob_count") else None
            ),
            echo_prompt=message.output.echo_prompt,
            prompt_logprob_count=(
                message.output.prompt_logprob_count if message.output.HasField("prompt_logprob_count") else None
            ),
        ),
        priority=message.priority,
        session_id=message.session_id,
        correlation_id=message.correlation_id,
        tenant=message.tenant,
        sample_count=message.sample_count or 1,
        resume=resume_from_proto(message.resume) if message.HasField("resume") else None,
    )
    return request, violations


def resume_from_proto(message: pb.ResumeOptions) -> ResumeOptions:
    return ResumeOptions(message.grace.ToNanoseconds() / 1e9 if message.HasField("grace") else None)


def chat_from_proto(message: pb.Chat, violations: list[FieldViolation]) -> ChatPrompt:
    """What could not be expressed is added to ``violations``."""
    choice = _TOOL_CHOICES.get(message.tool_choice.mode)
    if choice is None:
        violations.append(
            FieldViolation(
                "chat.tool_choice.mode", f"is {message.tool_choice.mode}; must be a value of ToolChoice.Mode"
            )
        )
    return ChatPrompt(
        messages=tuple(
            ChatMessage(
                role=each.role,
                content=each.content,
                tool_calls=tuple(ToolCall(call.id, call.name, call.arguments_json) for call in each.tool_calls),
                tool_call_id=each.tool_call_id,
                reasoning=each.reasoning,
                name=each.name,
            )
            for each in message.messages
        ),
        tools=tuple(Tool(each.name, each.description, each.parameters_json_schema) for each in message.tools),
        tool_choice=choice or ToolChoice.AUTO,
        tool_name=message.tool_choice.tool_name,
        template_arguments_json=message.template_arguments_json,
        keep_reasoning_in_text=message.keep_reasoning_in_text,
    )


def _prompt_from_proto(message: pb.GenerateRequest, violations: list[FieldViolation]) -> Prompt:
    match message.WhichOneof("prompt"):
        case "token_ids":
            return TokenPrompt(tuple(message.token_ids.ids))
        case "chat":
            return chat_from_proto(message.chat, violations)
        case _:
            return TextPrompt(message.text)  # an absent prompt is an empty one, and refused as such


def _sampling_from_proto(message: pb.Sampling) -> Sampling:
    default = Sampling()
    return Sampling(
        temperature=message.temperature if message.HasField("temperature") else default.temperature,
        top_p=message.top_p if message.HasField("top_p") else default.top_p,
        top_k=message.top_k if message.HasField("top_k") else default.top_k,
        min_p=message.min_p if message.HasField("min_p") else default.min_p,
        seed=message.seed if message.HasField("seed") else default.seed,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=(
            message.repetition_penalty if message.HasField("repetition_penalty") else default.repetition_penalty
        ),
        logit_bias=tuple((each.token_id, each.bias) for each in message.logit_bias),
        allowed_token_ids=tuple(message.allowed_token_ids.ids),
        bad_token_sequences=tuple(tuple(each.ids) for each in message.bad_token_sequences),
        structure=_structure_from_proto(message.structure),
    )


def _structure_from_proto(message: pb.StructuredOutput) -> Structure | None:
    match message.WhichOneof("kind"):
        case "json_schema":
            return Structure(StructureKind.JSON_SCHEMA, message.json_schema)
        case "json_object":
            return Structure(StructureKind.JSON_OBJECT)
        case "regex":
            return Structure(StructureKind.REGEX, message.regex)
        case "choice":
            return Structure(StructureKind.CHOICE, choices=tuple(message.choice.texts))
        case "grammar":
            return Structure(StructureKind.GRAMMAR, message.grammar)
    return None
