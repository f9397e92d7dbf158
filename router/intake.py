"""A request on its way in: checked, tokenised, and with a deadline, before it costs anything.

Owns the order check, then encode, and what a request is turned into; never decides where anything runs. Refusals of
what never reached the relay are counted here.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from baton.errors import BatonError, FieldViolation, deadline_exceeded
from baton.metrics import RouterMetrics, outcome_of
from baton.request import ChatPrompt, GenerateRequest, Sampling
from router.answer import TextAnswer
from router.answering import RoutedRequest
from router.chats.answer_parsing import AnswerParsing, AnswerPlan, ParsedAnswer, text_wanted
from router.chats.tool_words import required_structure
from router.chats.validation_chat import answer_violations
from router.prompt_encoder import PromptEncoder
from router.resuming.beginning import ReadAgain
from router.tokenizer import Detokenizer, Tokenizer
from router.validation import ModelLimits, check, resolved_output_token_count


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that may be served. Times are the loop's."""

    request: GenerateRequest
    routed: RoutedRequest
    model: str
    deadline_at: float
    received_at: float
    beginnings: tuple[ReadAgain, ...] = ()
    """What the caller has of each sample already; empty: nothing of any."""
    plan: AnswerPlan | None = None
    """How the answer is parsed; None: it is text and nothing else."""

    @property
    def time_allowed_s(self) -> float:
        return self.deadline_at - self.received_at


class Intake:
    """One per process; stateless."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        encoder: PromptEncoder,
        limits: Callable[[], ModelLimits],
        metrics: RouterMetrics,
        parsing: AnswerParsing | None = None,
        new_id: Callable[[], str] = lambda: f"gen-{secrets.token_hex(12)}",
    ) -> None:
        """``limits``: asked for each request, since the workers' context may be smaller than the model's.
        ``parsing``: None where no parser is configured."""
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._limits = limits
        self._metrics = metrics
        self._parsing = parsing
        self._new_id = new_id

    async def prepare(
        self,
        request: GenerateRequest,
        violations: Sequence[FieldViolation],
        *,
        deadline_at: float,
        received_at: float,
    ) -> Prepared:
        """``violations``: found while the message was read. Raises INVALID_REQUEST, PROMPT_TOO_LONG, MODEL_NOT_FOUND,
        DEADLINE_EXCEEDED, NO_WORKER while what parses answers is being started again."""
        try:
            limits = self._limits()
            check(request, limits, [*violations, *self._chat_violations(request)])
            plan = None if self._parsing is None else self._parsing.plan(request.prompt)
            try:
                async with asyncio.timeout_at(deadline_at):
                    if plan is not None and self._parsing is not None:
                        await self._parsing.ready()
                    prompt_token_ids = await self._encoder.encode(request.prompt, limits)
            except TimeoutError:
                raise deadline_exceeded("queue", 0) from None
        except BatonError as error:
            # The relay accounts for what it took on; what never reached it is accounted for here.
            self._metrics.request_ended(outcome_of(error))
            raise
        routed = self._routed(request, prompt_token_ids, limits)
        return Prepared(request, routed, limits.model, deadline_at, received_at, plan=plan)

    def limits(self) -> ModelLimits:
        """What the model can take, now."""
        return self._limits()

    def answer(self, prepared: Prepared) -> TextAnswer | ParsedAnswer:
        """What turns the tokens of one answer into text."""
        routed, plan = prepared.routed, prepared.plan
        keeps_special_tokens = plan is not None and self._keeps_special_tokens(plan)
        answer = TextAnswer(
            self._tokenizer,
            prepared.request.output if plan is None else text_wanted(prepared.request.output),
            stop_sequences=prepared.request.stop.stop_sequences,
            silent_token_ids=routed.end_token_ids,
            min_token_count=routed.min_output_token_count,
            keeps_special_tokens=keeps_special_tokens,
        )
        return answer if plan is None else ParsedAnswer(answer, keeps_special_tokens=keeps_special_tokens)

    def prompt_detokenizer(self) -> Detokenizer:
        """What spells a prompt as the model read it: special tokens are text like any other."""
        return self._tokenizer.detokenizer(keep_special_tokens=True)

    def _keeps_special_tokens(self, plan: AnswerPlan) -> bool:
        assert self._parsing is not None, "it made the plan"
        return self._parsing.keeps_special_tokens(plan)

    def _chat_violations(self, request: GenerateRequest) -> list[FieldViolation]:
        return self._encoder.violations(request.prompt) or answer_violations(request, self._encoder.abilities)

    def _routed(
        self, request: GenerateRequest, prompt_token_ids: tuple[int, ...], limits: ModelLimits
    ) -> RoutedRequest:
        asked = request.stop.max_output_token_count
        max_output = resolved_output_token_count(asked, len(prompt_token_ids), limits)
        return RoutedRequest(
            generation_id=self._new_id(),
            prompt_token_ids=prompt_token_ids,
            max_output_token_count=max_output,
            sampling=_sampling(request),
            stop_token_ids=request.stop.stop_token_ids,
            eos_token_ids=self._tokenizer.eos_token_ids,
            ignore_eos=request.stop.ignore_eos,
            is_context_bound=asked is None or asked > max_output,
            max_chunk_token_count=request.output.max_chunk_token_count,
            priority=request.priority,
            session_id=request.session_id,
            correlation_id=request.correlation_id,
            # An answer that the context cuts short has its end there, whatever was to be its least.
            min_output_token_count=min(request.stop.min_output_token_count, max_output),
            top_logprob_count=request.output.top_logprob_count,
            tenant=request.tenant,
            prompt_logprob_count=request.output.prompt_logprob_count,
        )


def _sampling(request: GenerateRequest) -> Sampling:
    """As asked; where a tool must be called, held to what the tools take."""
    structure = required_structure(request.prompt) if isinstance(request.prompt, ChatPrompt) else None
    return request.sampling if structure is None else replace(request.sampling, structure=structure)
