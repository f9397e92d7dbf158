"""Computes prompts, keeps their KV under lease, and hands out sealed tickets for it.

Owns the ledger of held KV and the one release path of each entry. No gRPC and no Ray; time is the loop's.
Never lets KV outlive its lease, and never answers with a ticket whose KV is not held.

    order -> Engine.prefill -> [KV held] -> Ledger.grant -> seal -> reply
                                                |
                    release_kv | lease over | close: Engine.release, once
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from baton.errors import BatonError, FieldViolation, engine_failed, internal, invalid_request, queue_full
from baton.leg import PrefillOrder, PrefillReply
from baton.metrics import Outcome, WorkerMetrics, outcome_of
from baton.secret import checked_secret
from engine.legs import MAX_LEG_ID_CHARS, RETRY_AFTER_S, Legs, check_order, is_duration
from engine.protocol import Engine, HeldKv, Prefilled, PrefillJob
from engine.recent_ids import RecentIds
from kvtransfer.ledger import Lease, Ledger
from kvtransfer.ticket import KvTicket, prompt_digest, seal, validate_transfer_params
from prefill_worker.config import PrefillLimits

logger = logging.getLogger(__name__)

__all__ = ["PrefillLimits", "PrefillWorker"]

PHASE = "prefill"
RELEASED_EARLY_COUNT = 4096
"""Releases remembered that came before, or without, the KV they name; far more than legs can be in hand."""


class PrefillWorker:
    """``run`` must run as a task of the owner for leases to expire; ``close`` ends it and lets go of everything."""

    def __init__(
        self,
        engine: Engine,
        *,
        worker_id: str,
        epoch: str,
        secret: bytes,
        metrics: WorkerMetrics | None = None,
        limits: PrefillLimits | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.limits = limits or PrefillLimits()
        self.on_change = on_change
        """Called after each change of the counts; may be replaced by whoever reports load."""
        self._engine = engine
        self._secret = checked_secret(secret)
        self._metrics = metrics or WorkerMetrics(CollectorRegistry(), worker_id)
        # The mutable state: legs in hand, leases open, releases on their way to the engine and those too early.
        self._legs = Legs(self.limits.max_leg_count, self._changed)
        self._ledger = Ledger(max_lease_count=self.limits.max_held_count, max_hold_s=self.limits.max_hold_s)
        self._releases: set[asyncio.Task[None]] = set()
        self._released_early = RecentIds(RELEASED_EARLY_COUNT)
        self._is_closed = False
        self._wake_reaper = asyncio.Event()
        self._change = asyncio.Event()

    def __repr__(self) -> str:
        state = " draining" if self.is_draining else ""
        return (
            f"<PrefillWorker {self.worker_id}{state} "
            f"[{self.running_count} prefilling | {self.held_lease_count} held, {len(self._releases)} letting go]>"
        )

    @property
    def running_count(self) -> int:
        return self._legs.count

    @property
    def held_lease_count(self) -> int:
        return len(self._ledger)

    @property
    def reserved_block_count(self) -> int:
        """Only decodes have blocks promised to them: a prompt waits in the engine, and nothing is held for it."""
        return 0

    @property
    def no_room_count(self) -> int:
        return 0

    @property
    def is_draining(self) -> bool:
        return self._legs.is_draining

    # The order path ------------------------------------------------------------------------------------------

    async def prefill(self, order: PrefillOrder) -> PrefillReply:
        """Computes, holds, answers. Cancelling aborts and leaves nothing held.

        Raises INVALID_REQUEST, PROMPT_TOO_LONG, QUEUE_FULL (no room for the leg or its KV), DRAINING,
        ENGINE_FAILED.
        """
        outcome = Outcome.FAILED
        try:
            reply = await self._prefill(order)
            outcome = Outcome.OK
            return reply
        except BatonError as error:
            outcome = outcome_of(error)
            raise
        except asyncio.CancelledError:
            outcome = Outcome.CANCELLED
            raise
        except Exception as error:
            # Only its type: the text of a foreign exception may quote the prompt.
            raise engine_failed(self.worker_id, f"prefill raised {type(error).__name__}") from error
        finally:
            self._metrics.leg_ended(PHASE, outcome)

    async def _prefill(self, order: PrefillOrder) -> PrefillReply:
        self._check(order)
        if self._is_closed:
            raise engine_failed(self.worker_id, "the worker is closed")
        # Every leg in hand may come to hold KV: the place for it is reserved before the work, not after.
        if not self._ledger.can_grant(reserved_count=self._legs.count):
            raise queue_full(self._legs.count + len(self._ledger), self.limits.max_held_count, RETRY_AFTER_S)
        with self._legs.entered():
            prefilled = await self._engine.prefill(
                PrefillJob(
                    leg_id=order.leg_id,
                    prompt_token_ids=order.prompt_token_ids,
                    sampling=order.sampling,
                    stop=order.stop,
                    priority=order.priority,
                    hold_kv=order.stop.max_token_count > 1,
                    lease_s=self.limits.max_hold_s,  # the backstop must outlast every extension of ours
                    output_token_count=order.output_token_count,
                    top_logprob_count=order.top_logprob_count,
                    tenant=order.tenant,
                    prompt_logprob_count=order.prompt_logprob_count,
                )
            )
            # From here to the grant nothing awaits: no cancellation can fall between held KV and its lease.
            self._observe(order, prefilled)
            if prefilled.held is None:
                return self._reply_without_ticket(prefilled)
            reply = await self._granted(order, prefilled, prefilled.held)
        try:
            await asyncio.sleep(0)  # lets a cancellation that came while we granted be seen before we answer
        except asyncio.CancelledError:
            await self.release_kv(reply.ticket_id)
            raise
        return reply

    async def _granted(self, order: PrefillOrder, prefilled: Prefilled, held: HeldKv) -> PrefillReply:
        try:
            if self._is_closed:
                raise ValueError("the worker was closed meanwhile")
            if order.leg_id in self._released_early:
                raise ValueError("it was released before it was ready")
            sealed, ticket_id = self._seal(order, prefilled, held)
            now = asyncio.get_running_loop().time()
            self._ledger.grant(now, ticket_id, held.handle, order.lease_s, held.kv_bytes)
        except Exception as error:
            await asyncio.shield(self._let_go(held.handle))
            detail = str(error) if isinstance(error, BatonError | ValueError) else type(error).__name__
            raise internal(f"held KV could not be granted: {detail}") from error
        self._wake_reaper.set()
        self._changed()
        return PrefillReply(
            first_token_id=prefilled.first_token_id,
            finish=None,
            ticket=sealed,
            ticket_id=ticket_id,
            queue_s=prefilled.queue_s,
            compute_s=prefilled.compute_s,
            cached_token_count=prefilled.cached_token_count,
            kv_bytes=held.kv_bytes,
            first_logprobs=prefilled.first_logprobs,
            prompt_logprobs=prefilled.prompt_logprobs,
        )

    def _reply_without_ticket(self, prefilled: Prefilled) -> PrefillReply:
        if prefilled.finish is None:
            raise engine_failed(self.worker_id, "the engine neither finished nor held the KV")
        return PrefillReply(
            first_token_id=prefilled.first_token_id,
            finish=prefilled.finish,
            ticket=b"",
            ticket_id="",
            queue_s=prefilled.queue_s,
            compute_s=prefilled.compute_s,
            cached_token_count=prefilled.cached_token_count,
            kv_bytes=0,
            first_logprobs=prefilled.first_logprobs,
            prompt_logprobs=prefilled.prompt_logprobs,
        )

    def _seal(self, order: PrefillOrder, prefilled: Prefilled, held: HeldKv) -> tuple[bytes, str]:
        params = validate_transfer_params(held.params, self.limits.transfer)
        if params.token_count != len(order.prompt_token_ids):
            raise ValueError(f"KV of {params.token_count} tokens for a prompt of {len(order.prompt_token_ids)}")
        ticket = KvTicket(
            ticket_id=order.leg_id,  # the caller knows it before our answer, which it may never see
            worker_id=self.worker_id,
            worker_epoch=self.epoch,
            prompt_digest=prompt_digest(order.prompt_token_ids),
            prompt_token_count=len(order.prompt_token_ids),
            first_token_id=prefilled.first_token_id,
            lease_s=order.lease_s,
            kv_bytes=held.kv_bytes,
            params=params,
            tenant=order.tenant,
        )
        return seal(ticket, self._secret), ticket.ticket_id

    def _check(self, order: PrefillOrder) -> None:
        more = []
        if not is_duration(order.lease_s, self.limits.max_hold_s):
            more.append(FieldViolation("lease_s", f"must be above 0 and at most {self.limits.max_hold_s:g}"))
        check_order(order, self._engine.info, more)

    def _observe(self, order: PrefillOrder, prefilled: Prefilled) -> None:
        self._metrics.leg_queue.labels(PHASE).observe(prefilled.queue_s)
        self._metrics.prefill_compute.observe(prefilled.compute_s)
        self._metrics.prefill_tokens.inc(max(0, len(order.prompt_token_ids) - prefilled.cached_token_count))

    # Leases --------------------------------------------------------------------------------------------------

    async def release_kv(self, ticket_id: str) -> bool:
        """Lets go of held KV and returns once the engine took note. False: unknown, or gone already. Idempotent.

        A ticket has the id of its leg, so a caller that gave up a prefill may release what it never heard of. If that
        comes before the KV is held, the KV is let go as soon as it is. Cancelling the call does not cancel the
        release.
        """
        lease = self._ledger.release(ticket_id)
        if lease is None:
            if len(ticket_id) <= MAX_LEG_ID_CHARS:  # no longer one can be a leg's
                self._released_early.add(ticket_id)
            return False
        self._changed()
        await asyncio.shield(self._let_go(lease.handle))
        return True

    async def extend_lease(self, ticket_id: str, lease_s: float) -> bool:
        """Starts the lease anew, up to ``max_hold_s`` after the grant. False: it has ended.

        Raises INVALID_REQUEST for a duration out of range.
        """
        if not is_duration(lease_s, self.limits.max_hold_s):
            what = f"must be above 0 and at most {self.limits.max_hold_s:g}"
            raise invalid_request([FieldViolation("lease_s", what)])
        is_held = self._ledger.extend(asyncio.get_running_loop().time(), ticket_id, lease_s)
        self._wake_reaper.set()
        return is_held

    async def run(self) -> None:
        """Expires leases on time, until ``close``. Exactly one task runs this."""
        loop = asyncio.get_running_loop()
        due_at = 0.0
        while not self._is_closed:
            self._wake_reaper.clear()
            # A timer may fire within the clock's resolution before its time: what it was set for is due.
            expired = self._ledger.expire(max(loop.time(), due_at))
            for lease in expired:
                self._expired(lease)
            if expired:
                self._changed()
            next_at = self._ledger.next_expiry_at
            try:
                async with asyncio.timeout_at(next_at):
                    await self._wake_reaper.wait()
            except TimeoutError:
                due_at = next_at or 0.0

    def _expired(self, lease: Lease) -> None:
        logger.warning("lease of ticket %s ended by time; nobody released it", lease.ticket_id)
        self._metrics.expired_leases.inc()
        self._let_go(lease.handle)  # a task of ours: a slow engine does not delay the other leases

    def _let_go(self, handle: str) -> asyncio.Task[None]:
        """The one way held KV leaves: called with a handle that has just left the ledger, or never was in it."""
        task = asyncio.get_running_loop().create_task(self._release(handle), name=f"release {handle}")
        self._releases.add(task)
        task.add_done_callback(self._released)
        return task

    async def _release(self, handle: str) -> None:
        try:
            async with asyncio.timeout(self.limits.release_timeout_s):
                await self._engine.release(handle)
        except Exception as error:  # an engine that cannot release is dead or dying: its own backstop frees
            what = error.reason.value if isinstance(error, BatonError) else type(error).__name__
            logger.error("the engine did not take the release of %s: %s", handle, what)
            self._metrics.failed_releases.inc()

    def _released(self, task: asyncio.Task[None]) -> None:
        self._releases.discard(task)
        self._changed()

    # Life ----------------------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> int:
        """Takes no more orders; waits until legs and leases are done. Returns how many are left at the end."""
        self._legs.close_door()
        try:
            async with asyncio.timeout(timeout_s):
                while self._legs.count or len(self._ledger) or self._releases:
                    self._change.clear()
                    await self._change.wait()
        except TimeoutError:
            pass
        return self._legs.count + len(self._ledger)

    async def close(self) -> None:
        """Refuses orders, ends ``run`` and lets go of all held KV, in bounded time. Idempotent.

        Legs in hand are their callers' to cancel, before this.
        """
        self._is_closed = True
        self._legs.close_door()
        self._wake_reaper.set()
        for lease in self._ledger.close():
            self._let_go(lease.handle)
        if self._releases:
            await asyncio.shield(asyncio.gather(*self._releases))
        self._changed()

    def _changed(self) -> None:
        self._change.set()
        self.on_change()
