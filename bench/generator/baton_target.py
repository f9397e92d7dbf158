"""Baton's public gRPC service as a target: token ids in, text out, as its users call it.

gRPC's own retries are off here: what was refused is counted as refused, not sent again behind the generator's back.
One channel is one HTTP/2 connection. Baton's server sets no bound on its streams (SETTINGS_MAX_CONCURRENT_STREAMS),
so no stream queues in the client; several channels, each with its own connection, are for servers behind a proxy that
does.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing

from baton.client import BatonClient, Chunk, Finished, Started
from baton.errors import BatonError, Reason, StatusName
from baton.request import StopConditions, TokenPrompt
from bench.generator.target import ServerFacts, TargetError, TargetEvent, Tokens
from bench.results.records import Outcome
from bench.traffic.plan import PlannedRequest

_TURNED_AWAY = (StatusName.RESOURCE_EXHAUSTED, StatusName.UNAVAILABLE, StatusName.INVALID_ARGUMENT)


class BatonTarget:
    """Must be made inside the event loop that uses it. Connects at the first request."""

    def __init__(self, address: str, *, model: str = "", channel_count: int = 1) -> None:
        options = [("grpc.enable_retries", 0)]
        if channel_count > 1:
            options.append(("grpc.use_local_subchannel_pool", 1))  # or they would share one connection
        self.address = address
        self._model = model
        self.model = model
        """As the server called it in its last answer."""
        self._clients = [BatonClient(address, options=options) for _ in range(channel_count)]
        self._turn = itertools.cycle(self._clients)

    async def generate(self, request: PlannedRequest, *, timeout_s: float) -> AsyncGenerator[TargetEvent, None]:
        loop = asyncio.get_running_loop()
        wanted = request.output_token_count
        seen = 0
        answer = next(self._turn).generate(
            TokenPrompt(request.prompt_token_ids),
            timeout=timeout_s,
            model=self._model,
            stop=StopConditions(max_output_token_count=wanted, ignore_eos=True),
            priority=request.priority,
            session_id=request.session_id,
        )
        try:
            async with aclosing(answer) as events:
                async for event in events:
                    if type(event) is Chunk:
                        if event.token_count:
                            seen += event.token_count
                            yield Tokens(loop.time(), event.token_count)
                    elif type(event) is Finished:
                        yield _facts(event)
                    elif type(event) is Started:
                        self.model = event.model
        except BatonError as error:
            raise TargetError(_outcome(error, seen), _words(error, seen)) from None
        if seen != wanted:
            raise TargetError(Outcome.INCOMPLETE, f"{seen} tokens came for {wanted}")

    async def check(self, *, timeout_s: float) -> None:
        """Returns when Baton serves. Raises ``BatonError`` when it does not within ``timeout_s``."""
        await self._clients[0].wait_until_serving(timeout=timeout_s)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


def _outcome(error: BatonError, seen: int) -> Outcome:
    if error.status is StatusName.DEADLINE_EXCEEDED:
        return Outcome.TIMEOUT
    is_lost = "transport" in error.metadata  # nobody turned it away: nobody was there
    if seen == 0 and not is_lost and (error.status in _TURNED_AWAY or error.reason is Reason.PROMPT_TOO_LONG):
        return Outcome.REFUSED
    return Outcome.ERROR


def _words(error: BatonError, seen: int) -> str:
    """Stable, so that equal failures can be counted together; how many tokens came is in the record."""
    where = " after tokens had come" if seen else ""
    lost = " (connection)" if "transport" in error.metadata else ""
    return f"{error.status.value}/{error.reason.value}{lost}{where}"


def _facts(finished: Finished) -> ServerFacts:
    phases, usage = finished.phases, finished.usage
    mode = phases.placement_mode.value if phases.placement_mode else "unknown"
    return ServerFacts(
        phases_s={phase.value: seconds for phase, seconds in phases.seconds.items()},
        kv_transfer_bytes=phases.kv_transfer_bytes,
        placement=f"{mode}/{phases.placement_reason}" if phases.placement_reason else mode,
        attempt_count=phases.attempt_count,
        prefill_worker_id=phases.prefill_worker_id or None,
        decode_worker_id=phases.decode_worker_id or None,
        prompt_token_count=usage.prompt_token_count,
        cached_prompt_token_count=usage.cached_prompt_token_count,
    )
