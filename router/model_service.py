"""ModelService on gRPC: what is served, and how a prompt becomes tokens and tokens become text.

Thin. Prompts take the road of Generate: the same checks, the same encoder, so that a count is what Generate would
count. Costs no engine time and a bounded share of the tokenizer's thread: at most one long text of this service is
tokenised or waits for the thread at a time, so that no prompt of Generate waits for more than one of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, TypeVar

from baton.errors import (
    BatonError,
    FieldViolation,
    deadline_exceeded,
    draining,
    internal,
    invalid_request,
    model_not_found,
)
from baton.request import ChatPrompt, GenerateRequest, Prompt, TextPrompt, TokenPrompt
from baton.status import abort
from baton.v1 import model_pb2 as pb
from baton.v1 import model_pb2_grpc as pb_grpc
from router.call_places import CallPlaces
from router.model_card import ModelCard
from router.prompt_encoder import PromptEncoder
from router.service_lengths import check_chat_lengths
from router.service_messages import chat_from_proto
from router.tokenizer import OFF_LOOP_BYTES, OFF_LOOP_TOKENS, Tokenizer
from router.validation import check, shown, violations_of

SERVICE_NAME = "baton.v1.ModelService"

MAX_CALL_S = 60.0
"""For callers that set no deadline or a later one: nothing here takes so long but a wait for the tokenizer."""
_MARGIN_SHARE, _MARGIN_MAX_S = 0.05, 0.05
"""We stop this much before the caller's deadline, so that it hears from us where the time went."""
_PHASE = "queue"
"""All that a call here waits for is its turn."""

_Reply = TypeVar("_Reply")

logger = logging.getLogger("baton.router")


class ModelService(pb_grpc.ModelServiceServicer):
    """One per process. ``begin_drain`` makes it refuse; ``wait_idle`` says when the last call has ended."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        encoder: PromptEncoder,
        card: Callable[[], ModelCard],
        authorise: Callable[[Any], None] = lambda context: None,
        max_call_count: int = 4096,
    ) -> None:
        """``card``: asked for each call, since the workers' context may be smaller than the model's. ``authorise``:
        given the call's context; raises UNAUTHENTICATED for a caller without a key where keys are asked for.
        ``max_call_count``: that run here at once; further ones get QUEUE_FULL."""
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._card = card
        self._authorise = authorise
        # The mutable state: calls that run, whether new ones may, and whose long text is at the tokenizer.
        self.call_count = 0
        self._places = CallPlaces(max_call_count)
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._long_text = asyncio.Lock()

    # The calls

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        async def answer() -> pb.ListModelsResponse:
            return pb.ListModelsResponse(models=[_to_proto(self._card())])

        return await self._counted(answer, context)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        async def answer() -> pb.GetModelResponse:
            return pb.GetModelResponse(model=_to_proto(self._card_of(request.name)))

        return await self._counted(answer, context)

    async def CountTokens(self, request: pb.CountTokensRequest, context: Any) -> pb.CountTokensResponse:
        async def answer() -> pb.CountTokensResponse:
            token_ids = await self._token_ids(request)
            most = self._card().limits.max_prompt_token_count
            return pb.CountTokensResponse(token_count=len(token_ids), max_prompt_token_count=most)

        return await self._counted(answer, context)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        async def answer() -> pb.TokenizeResponse:
            is_bare = request.HasField("add_special_tokens") and not request.add_special_tokens
            return pb.TokenizeResponse(token_ids=await self._token_ids(request, is_bare=is_bare))

        return await self._counted(answer, context)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        async def answer() -> pb.DetokenizeResponse:
            card = self._card_of(request.model)
            most = card.limits.max_context_token_count
            count = len(request.token_ids.ids)
            if count > most:
                what = f"has {count} ids; at most {most}, the model's context. Send it in parts."
                raise invalid_request([FieldViolation("token_ids.ids", what)])
            token_ids = tuple(request.token_ids.ids)
            violations = violations_of(GenerateRequest(TokenPrompt(token_ids)), card.limits)
            if violations:
                raise invalid_request(violations)
            async with self._turn(is_long=count > OFF_LOOP_TOKENS):
                text = await self._tokenizer.decode_bounded(
                    token_ids, keep_special_tokens=request.keep_special_tokens
                )
            return pb.DetokenizeResponse(text=text)

        return await self._counted(answer, context)

    def begin_drain(self) -> None:
        """From now on new calls get DRAINING; those that run go on."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns when no call runs. Bound it with a timeout."""
        await self._idle.wait()

    # Parts

    async def _counted(self, answer: Callable[[], Awaitable[_Reply]], context: Any) -> _Reply:
        """Runs one call within its deadline and ends it with its status, whatever happens."""
        self.call_count += 1
        self._idle.clear()
        try:
            try:
                if self._is_draining:
                    raise draining()
                self._authorise(context)
                with self._places.one():
                    async with asyncio.timeout(_time_allowed_s(context)):
                        return await answer()
            except BatonError:
                raise
            except TimeoutError:
                raise deadline_exceeded(_PHASE, 0) from None
            except Exception as error:
                # Only its type: the text of a foreign exception may quote the prompt.
                logger.error("a bug in ModelService: %s", type(error).__name__)
                raise internal(type(error).__name__) from error
        except BatonError as error:
            await abort(context, error)
        finally:
            self.call_count -= 1
            if self.call_count == 0:
                self._idle.set()

    def _card_of(self, name: str) -> ModelCard:
        card = self._card()
        if name and name != card.limits.model:
            raise model_not_found(shown(name), [card.limits.model])
        return card

    async def _token_ids(
        self, request: pb.CountTokensRequest | pb.TokenizeRequest, *, is_bare: bool = False
    ) -> Sequence[int]:
        """As Generate would have them. ``is_bare``: without the special tokens that the tokenizer adds by default,
        which a chat's template writes itself. Raises what Generate would raise against the prompt."""
        limits = self._card().limits
        violations: list[FieldViolation] = []
        prompt: Prompt = TextPrompt(request.text)  # an absent prompt is an empty one, and refused as such
        if request.WhichOneof("prompt") == "chat":
            check_chat_lengths(request.chat)
            prompt = chat_from_proto(request.chat, violations)
        check(GenerateRequest(prompt, request.model), limits, [*violations, *self._encoder.violations(prompt)])
        # A template adds to the text and a character may have four bytes: what is not surely short is long.
        async with self._turn(is_long=_char_count(prompt) * 8 > OFF_LOOP_BYTES):
            if is_bare and isinstance(prompt, TextPrompt):
                return await self._tokenizer.encode_bounded(
                    prompt.text, max_token_count=limits.max_prompt_token_count, add_special_tokens=False
                )
            return await self._encoder.encode(prompt, limits)

    def _turn(self, *, is_long: bool) -> AbstractAsyncContextManager[None]:
        """A turn at the tokenizer's thread; what is short does not go there."""
        return self._long_text if is_long else nullcontext()


def _char_count(prompt: Prompt) -> int:
    """Of all that a template may write."""
    match prompt:
        case TextPrompt(text):
            return len(text)
        case ChatPrompt():
            texts = [prompt.template_arguments_json]
            for tool in prompt.tools:
                texts += tool.name, tool.description, tool.parameters_json_schema
            for message in prompt.messages:
                texts += message.role, message.content, message.reasoning, message.name, message.tool_call_id
                for call in message.tool_calls:
                    texts += call.id, call.name, call.arguments_json
            return sum(map(len, texts))
        case TokenPrompt():
            return 0


def _time_allowed_s(context: Any) -> float:
    remaining_s: float | None = context.time_remaining()
    if remaining_s is None:
        return MAX_CALL_S
    return min(remaining_s - min(_MARGIN_MAX_S, remaining_s * _MARGIN_SHARE), MAX_CALL_S)


def _to_proto(card: ModelCard) -> pb.Model:
    capabilities = card.capabilities
    return pb.Model(
        name=card.limits.model,
        max_context_token_count=card.limits.max_context_token_count,
        vocab_size=card.limits.vocab_size,
        special_tokens=[pb.SpecialToken(token_id=token_id, text=text) for token_id, text in card.special_tokens],
        end_token_ids=card.limits.eos_token_ids,
        chat_template=card.chat_template,
        capabilities=pb.Capabilities(
            has_chat=capabilities.has_chat,
            has_tools=capabilities.has_tools,
            tool_parser=capabilities.tool_parser,
            reasoning_parser=capabilities.reasoning_parser,
            template_argument_names=capabilities.template_argument_names,
            max_sample_count=capabilities.max_sample_count,
            max_top_logprob_count=capabilities.max_top_logprob_count,
            has_resume=capabilities.has_resume,
        ),
    )
