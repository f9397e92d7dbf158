"""Continues requests from a prefill's KV, or from the bare prompt.

Owns the checks between a ticket and the engine: KV that is not provably this prompt's never becomes tokens. No
gRPC and no Ray; time is the loop's. Never releases a prefill worker's KV: the router does, on ``KvAdopted``.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from baton.errors import BatonError, Reason, cache_too_small, engine_failed, no_room, ticket_refused
from baton.leg import DecodeDone, DecodeEvent, DecodeOrder, KvAdopted, Stepped
from baton.metrics import Outcome, WorkerMetrics, outcome_of
from baton.secret import checked_secret
from decode_worker.config import DecodeLimits
from decode_worker.reservations import BlockBook, NeverFits, NoRoom, Reservation, wanted_block_count
from engine.legs import RETRY_AFTER_S, Legs, check_order
from engine.protocol import DecodeJob, Engine
from engine.recent_ids import RecentIds
from kvtransfer.ticket import KvTicket, open_ticket, prompt_digest

__all__ = ["DecodeLimits", "DecodeWorker"]

PHASE = "decode"


class DecodeWorker:
    """Has no task of its own: each decode lives in the generator that its caller holds."""

    def __init__(
        self,
        engine: Engine,
        *,
        worker_id: str,
        epoch: str,
        secret: bytes,
        metrics: WorkerMetrics | None = None,
        limits: DecodeLimits | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.limits = limits or DecodeLimits()
        self.on_change = on_change
        """Called after each change of the counts; may be replaced by whoever reports load."""
        self._engine = engine
        self._secret = checked_secret(secret)
        self._metrics = metrics or WorkerMetrics(CollectorRegistry(), worker_id)
        # The mutable state: legs in hand, the blocks promised to them (opened with the first order: only a started
        # engine knows its blocks), and the tickets they and their predecessors used up.
        self._legs = Legs(self.limits.max_leg_count, lambda: self.on_change())
        self._book: BlockBook | None = None
        self._no_room_count = 0
        self._seen = RecentIds(self.limits.max_seen_ticket_count)

    def __repr__(self) -> str:
        state = " draining" if self.is_draining else ""
        return (
            f"<DecodeWorker {self.worker_id}{state} [{self.running_count} decoding | {len(self._seen)} tickets used]>"
        )

    @property
    def running_count(self) -> int:
        return self._legs.count

    @property
    def held_lease_count(self) -> int:
        """A decode worker holds nothing for others."""
        return 0

    @property
    def reserved_block_count(self) -> int:
        return 0 if self._book is None else self._book.reserved_block_count

    @property
    def no_room_count(self) -> int:
        """Orders refused for want of room, since the process began."""
        return self._no_room_count

    @property
    def is_draining(self) -> bool:
        return self._legs.is_draining

    async def decode(self, order: DecodeOrder) -> AsyncGenerator[DecodeEvent, None]:
        """``KvAdopted Stepped* DecodeDone``. Closing the generator aborts the decode and frees everything.

        Raises INVALID_REQUEST, PROMPT_TOO_LONG, TICKET_REFUSED, NO_ROOM, QUEUE_FULL, DRAINING, ENGINE_FAILED. After
        NO_ROOM the ticket is as good as before.
        """
        outcome = Outcome.FAILED
        is_complete = False
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        try:
            with self._legs.entered(), self._reserved(order) as (job, settle):
                async with aclosing(self._engine.decode(job)) as events:
                    async for event in events:
                        self._observe(job, event)
                        if isinstance(event, KvAdopted):
                            settle()
                            began_at = loop.time() - event.first_step_s
                        is_complete = isinstance(event, DecodeDone)
                        if is_complete:
                            self._metrics.decode.observe(loop.time() - began_at)
                        yield event
                if not is_complete:
                    raise engine_failed(self.worker_id, "the engine ended a decode without saying why")
                outcome = Outcome.OK
        except BatonError as error:
            outcome = outcome_of(error)
            if error.reason is Reason.TICKET_REFUSED:
                self._metrics.refused_tickets.labels(error.metadata.get("check", "engine")).inc()
            raise
        except (asyncio.CancelledError, GeneratorExit):
            # A caller that leaves after the last event got everything.
            outcome = Outcome.OK if is_complete else Outcome.CANCELLED
            raise
        except Exception as error:
            # Only its type: the text of a foreign exception may quote the prompt.
            raise engine_failed(self.worker_id, f"decode raised {type(error).__name__}") from error
        finally:
            self._metrics.leg_ended(PHASE, outcome)

    @contextmanager
    def _reserved(self, order: DecodeOrder) -> Iterator[tuple[DecodeJob, Callable[[], None]]]:
        """The order as a job whose blocks are promised to it while the block runs, however it ends; and what to call
        once the engine has them."""
        check_order(order, self._engine.info)
        ticket = self._opened(order) if order.ticket else None
        reservation = self._reservation(order)
        book = self._book
        assert book is not None
        try:
            if ticket is not None:
                # AFTER the blocks are promised, and before the engine: a refused ticket is not used up.
                self._seen.add(ticket.ticket_id)

            def settle() -> None:
                book.settle(reservation)
                self.on_change()

            self.on_change()
            yield self._job(order, None if ticket is None else ticket.params.to_engine()), settle
        finally:
            book.release(reservation)

    def _reservation(self, order: DecodeOrder) -> Reservation:
        """Raises NO_ROOM, or PROMPT_TOO_LONG for what could never fit. An order without a ticket waits in the engine,
        as any prompt does: no KV is held for it elsewhere, and nothing is gained by refusing it."""
        info = self._engine.info
        if self._book is None:
            self._book = BlockBook(info.block_count)
        prompt_token_count = len(order.prompt_token_ids)
        wanted = wanted_block_count(prompt_token_count, order.stop.max_token_count, info)
        used = self._engine.load().used_block_count
        match self._book.reserve(wanted, used, may_wait=not order.ticket):
            case NoRoom() as refusal:
                self._no_room_count += 1
                self._metrics.no_room.inc()
                raise no_room(refusal.wanted_block_count, refusal.free_block_count, RETRY_AFTER_S)
            case NeverFits() as refusal:
                asked_count = prompt_token_count - order.output_token_count  # what the caller knows as its prompt
                raise cache_too_small(asked_count, refusal.wanted_block_count, refusal.block_count)
            case reservation:
                return reservation

    def _job(self, order: DecodeOrder, pull: dict[str, Any] | None) -> DecodeJob:
        return DecodeJob(
            leg_id=order.leg_id,
            prompt_token_ids=order.prompt_token_ids,
            sampling=order.sampling,
            stop=order.stop,
            priority=order.priority,
            pull=pull,
            output_token_count=order.output_token_count,
            top_logprob_count=order.top_logprob_count,
            tenant=order.tenant,
        )

    def _opened(self, order: DecodeOrder) -> KvTicket:
        """The order's ticket, once every check passed."""
        ticket = open_ticket(order.ticket, self._secret, self.limits.transfer)
        if ticket.tenant != order.tenant:
            raise ticket_refused("tenant", "the KV is another tenant's")
        self._check_ticket(ticket, order.prompt_token_ids)
        return ticket

    def _check_ticket(self, ticket: KvTicket, prompt_token_ids: tuple[int, ...]) -> None:
        allowed = self.limits.allowed_prefill_workers
        if allowed is not None and ticket.worker_id not in allowed:
            raise ticket_refused("worker", "minted by a worker that is not allowed here")
        if ticket.worker_id == self.worker_id:
            raise ticket_refused("own_worker", "an engine does not pull from itself; decode without a ticket")
        if ticket.prompt_token_count != len(prompt_token_ids) - 1:
            raise ticket_refused("prompt_token_count", "the order's prompt has another length")
        if ticket.first_token_id != prompt_token_ids[-1]:
            raise ticket_refused("first_token", "the order continues from another token")
        if not hmac.compare_digest(ticket.prompt_digest, prompt_digest(prompt_token_ids[:-1])):
            raise ticket_refused("prompt_digest", "the KV is another prompt's")
        if ticket.ticket_id in self._seen:
            raise ticket_refused("replayed", "a ticket is good for one pull")

    def _observe(self, job: DecodeJob, event: DecodeEvent) -> None:
        match event:
            case KvAdopted():
                self._metrics.leg_queue.labels(PHASE).observe(event.wait_s)
                if job.pull is not None:
                    self._metrics.kv_transfer.observe(event.transfer_s)
                    self._metrics.kv_bytes.inc(event.transfer_bytes)
                    self._metrics.prefill_tokens.inc(event.recomputed_token_count)
                else:
                    self._metrics.prefill_tokens.inc(max(0, len(job.prompt_token_ids) - event.cached_token_count))
            case Stepped():
                self._metrics.decode_tokens.inc(len(event.token_ids))
            case DecodeDone():
                pass

    async def drain(self, timeout_s: float) -> int:
        """Takes no more orders; waits until the legs in hand are done. Returns how many are left at the end."""
        self._legs.close_door()
        try:
            async with asyncio.timeout(timeout_s):
                await self._legs.wait_idle()
        except TimeoutError:
            pass
        return self._legs.count

    async def run(self) -> None:
        """Nothing to do in the background; ends at once. Here so that workers are run alike."""

    async def close(self) -> None:
        """Refuses orders from now on. Idempotent; the legs in hand are their callers' to close."""
        self._legs.close_door()
