"""The simulated cluster as a target of the generator: what ``BatonTarget`` is to a real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from baton.errors import BatonError, Reason, StatusName
from baton.request import GenerateRequest, StopConditions, TokenPrompt
from bench.generator.target import ServerFacts, TargetError, TargetEvent, Tokens
from bench.results.records import Outcome
from bench.simulation.cluster import SimulatedCluster
from bench.traffic.plan import PlannedRequest
from bench.virtual_cluster import TokenAnswer
from router.answering import Completed, Piece, RoutedRequest
from router.validation import check, resolved_output_token_count

_TURNED_AWAY = (StatusName.RESOURCE_EXHAUSTED, StatusName.UNAVAILABLE, StatusName.INVALID_ARGUMENT)


class SimulatedTarget:
    """Talks to the relay as the router's gRPC service does: the same checks, the same words."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._limits = cluster.limits

    async def generate(self, request: PlannedRequest, *, timeout_s: float) -> AsyncGenerator[TargetEvent, None]:
        loop = asyncio.get_running_loop()
        received_at = loop.time()
        generation_id = f"s{request.index}"
        book = self._cluster.book
        book.open(generation_id, len(request.prompt_token_ids), is_exact=request.cancel_after_s is not None)
        seen = 0
        try:
            routed = self._routed(generation_id, request)
            relayed = self._cluster.relay.run(routed, TokenAnswer(), received_at + timeout_s, received_at=received_at)
            async with aclosing(relayed) as events:
                async for event in events:
                    match event:
                        case Piece(first_token_index=first) if event.token_count:
                            now = loop.time()
                            for at_s in book.times(generation_id, first, event.token_count):
                                if at_s > now:
                                    await asyncio.sleep(at_s - now)
                                    now = loop.time()
                                seen += 1
                                yield Tokens(at_s, 1)
                        case Completed():
                            yield _facts(event)
        except BatonError as error:
            raise TargetError(_outcome(error, seen), _words(error, seen)) from None
        finally:
            book.close(generation_id)
        if seen != request.output_token_count:
            raise TargetError(Outcome.INCOMPLETE, f"{seen} tokens came for {request.output_token_count}")

    async def close(self) -> None:
        """Has no connections: the cluster is its owner's to close."""

    def _routed(self, generation_id: str, request: PlannedRequest) -> RoutedRequest:
        """Raises what the service raises for what it does not take."""
        wanted = request.output_token_count
        asked = GenerateRequest(
            prompt=TokenPrompt(request.prompt_token_ids),
            stop=StopConditions(max_output_token_count=wanted, ignore_eos=True),
            priority=request.priority,
            session_id=request.session_id,
        )
        check(asked, self._limits, [])
        count = resolved_output_token_count(wanted, len(request.prompt_token_ids), self._limits)
        return RoutedRequest(
            generation_id,
            request.prompt_token_ids,
            count,
            ignore_eos=True,
            is_context_bound=wanted > count,
            priority=request.priority,
            session_id=request.session_id,
        )


def _outcome(error: BatonError, seen: int) -> Outcome:
    """As ``BatonTarget`` counts them."""
    if error.status is StatusName.DEADLINE_EXCEEDED:
        return Outcome.TIMEOUT
    if seen == 0 and (error.status in _TURNED_AWAY or error.reason is Reason.PROMPT_TOO_LONG):
        return Outcome.REFUSED
    return Outcome.ERROR


def _words(error: BatonError, seen: int) -> str:
    return f"{error.status.value}/{error.reason.value}{' after tokens had come' if seen else ''}"


def _facts(completed: Completed) -> ServerFacts:
    report, usage = completed.report, completed.usage
    mode, reason = report.mode.value, report.placement_reason
    return ServerFacts(
        phases_s={phase.value: report.durations[phase] for phase in report.durations.seconds},
        kv_transfer_bytes=report.kv_transfer_bytes,
        placement=f"{mode}/{reason}" if reason else mode,
        attempt_count=report.attempt_count,
        prefill_worker_id=report.prefill_worker_id or None,
        decode_worker_id=report.decode_worker_id or None,
        prompt_token_count=usage.prompt_token_count,
        cached_prompt_token_count=usage.cached_prompt_token_count,
    )
