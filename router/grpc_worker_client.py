"""One worker over gRPC. Protobuf stops here.

Owns one channel. Calls fail fast while the worker cannot be reached: whoever calls knows where else to go. A killed
worker breaks its connections, and every call on them, at once; one that hangs is noticed by the roster's watch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, NoReturn, TypeVar

import grpc

from baton.errors import BatonError, Reason, engine_failed, internal
from baton.leg import (
    DecodeOrder,
    Introduced,
    PrefillOrder,
    PrefillReply,
    PromptLogprobs,
    WorkerInfo,
    WorkerLoad,
)
from baton.request import Role
from baton.secret import TOKEN_KEY, cluster_token
from baton.status import from_rpc_error
from baton.worker.v1 import worker_pb2 as pb
from baton.worker.v1 import worker_pb2_grpc
from router.leg_messages_client import finish_of, logprobs_of, prefill_request
from router.leg_stream_client import LegStreamClient
from router.worker_client import DecodeSink

T = TypeVar("T")

CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # A worker that comes back is found at once, not after gRPC's backoff of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    # The time a connection may take: a busy machine pauses for longer than 50 ms. A refused one fails at once.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Finds a connection that died without a word; no oftener than workers permit.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Each client its own connection: another one's trouble is not ours.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
RELEASE_TIMEOUT_S = 5.0
LATE_RELEASE_ATTEMPT_COUNT = 2
LATE_RELEASE_PAUSE_S = 0.2

logger = logging.getLogger(__name__)


class GrpcWorkerClient:
    """Satisfies ``WorkerClient``."""

    def __init__(self, address: str, secret: bytes) -> None:
        self.address = address
        self._metadata = ((TOKEN_KEY, cluster_token(secret)),)
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._prefill_stub: Any = worker_pb2_grpc.PrefillServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._decode_stub: Any = worker_pb2_grpc.DecodeServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._worker_stub: Any = worker_pb2_grpc.WorkerServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._late_releases: set[asyncio.Task[None]] = set()
        self._legs = LegStreamClient(
            lambda: self._open_stream(self._decode_stub.DecodeMany),
            lambda order, timeout_s: self._open(self._decode_stub.Decode, order, timeout_s),
            self._answer,
            self.address,
        )

    def __repr__(self) -> str:
        return f"<GrpcWorkerClient {self.address}>"

    async def prefill(self, order: PrefillOrder, *, timeout_s: float) -> PrefillReply:
        scores: PromptLogprobs | None = None
        call = self._open_prefill(order, timeout_s)
        try:
            if order.prompt_logprob_count is None:
                reply = await self._answer(call)
            else:
                scores = PromptLogprobs(order.prompt_logprob_count)
                reply = await self._scored(call, scores, len(order.prompt_token_ids))
        except (asyncio.CancelledError, BatonError):
            # Its answer may be on the way all the same, and nobody would ever know of the KV that is held. The ticket
            # has the leg's id, so it can be let go unseen; AFTER the cancel, which goes out on the same connection.
            call.cancel()
            self._release_late(order.leg_id)
            raise
        return PrefillReply(
            first_token_id=reply.first_token_id,
            finish=finish_of(reply),
            ticket=reply.ticket,
            ticket_id=reply.ticket_id,
            queue_s=reply.queue_s,
            compute_s=reply.compute_s,
            cached_token_count=reply.cached_token_count,
            kv_bytes=reply.kv_byte_count,
            first_logprobs=logprobs_of(reply.first_logprobs) if reply.HasField("first_logprobs") else None,
            prompt_logprobs=scores,
        )

    def _open_prefill(self, order: PrefillOrder, timeout_s: float) -> Any:
        request = prefill_request(order)
        if order.prompt_logprob_count is None:
            return self._open(self._prefill_stub.Prefill, request, timeout_s)
        scored = pb.PrefillScoredRequest(prefill=request, prompt_logprob_count=order.prompt_logprob_count)
        return self._open(self._prefill_stub.PrefillScored, scored, timeout_s)

    async def _scored(self, call: Any, scores: PromptLogprobs, token_count: int) -> Any:
        """The answer after the scores, which are put into ``scores``. Raises INTERNAL for what does not fit."""
        while (message := await self._answer(call.read())) is not grpc.aio.EOF:
            if message.WhichOneof("event") == "prefilled":
                return message.prefilled
            part = message.part
            try:
                scores.extend(part.logprobs, part.ranks, part.top_token_ids, part.top_logprobs)
            except ValueError as error:
                raise internal(f"a worker's {error}") from None
            if len(scores) > token_count:
                raise internal("a worker brought logprobs of more tokens than the prompt has")
        raise engine_failed(self.address, "ended a prefill without an answer")

    async def release_kv(self, ticket_id: str, *, timeout_s: float) -> bool:
        request = pb.ReleaseKvRequest(ticket_id=ticket_id)
        call = self._open(self._prefill_stub.ReleaseKv, request, timeout_s)
        reply = await self._answer(call)
        return bool(reply.was_held)

    async def extend_lease(self, ticket_id: str, lease_s: float, *, timeout_s: float) -> bool:
        request = pb.ExtendLeaseRequest(ticket_id=ticket_id, lease_s=lease_s)
        call = self._open(self._prefill_stub.ExtendLease, request, timeout_s)
        reply = await self._answer(call)
        return bool(reply.is_held)

    async def decode(self, order: DecodeOrder, *, timeout_s: float, sink: DecodeSink) -> None:
        await self._legs.decode(order, timeout_s=timeout_s, sink=sink)

    async def watch_load(self, interval_s: float) -> AsyncGenerator[WorkerLoad, None]:
        request = pb.WatchLoadRequest(interval_ms=round(1000 * interval_s))
        call = self._open(self._worker_stub.WatchLoad, request, None)
        try:
            while (message := await self._answer(call.read())) is not grpc.aio.EOF:
                yield WorkerLoad(
                    epoch=message.epoch,
                    running_count=message.running_count,
                    waiting_count=message.waiting_count,
                    used_block_count=message.used_block_count,
                    block_count=message.block_count,
                    held_lease_count=message.held_lease_count,
                    quarantined_pull_count=message.quarantined_pull_count,
                    reserved_block_count=message.reserved_block_count,
                    no_room_count=message.no_room_count,
                    is_draining=message.is_draining,
                )
        finally:
            call.cancel()

    async def info(self, *, timeout_s: float) -> WorkerInfo:
        request = pb.GetWorkerInfoRequest()
        call = self._open(self._worker_stub.GetWorkerInfo, request, timeout_s)
        info = await self._answer(call)
        try:
            role = Role(info.role)
        except ValueError:
            raise internal(f"worker {info.worker_id} at {self.address} has no known role") from None
        return WorkerInfo(
            worker_id=info.worker_id,
            epoch=info.epoch,
            role=role,
            model=info.model,
            max_context_token_count=info.max_context_token_count,
            block_token_count=info.block_token_count,
            block_count=info.block_count,
            max_running_count=info.max_running_count,
            kv_bytes_per_token=info.kv_bytes_per_token,
            engine=info.engine,
            vocab_size=info.vocab_size,
            transfer_peer=info.transfer_peer,
        )

    async def introduce(self, transfer_peers: Sequence[bytes], *, timeout_s: float) -> list[Introduced]:
        request = pb.IntroduceRequest(transfer_peers=transfer_peers)
        reply = await self._answer(self._open(self._worker_stub.Introduce, request, timeout_s))
        return [Introduced(each.worker_id, each.epoch, each.problem, each.duration_s) for each in reply.introduced]

    async def close(self) -> None:
        if self._late_releases:
            await asyncio.wait(self._late_releases, timeout=RELEASE_TIMEOUT_S)
        await self._legs.close()
        await self._channel.close()

    def _open(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=False)
        except grpc.aio.UsageError:
            self._raise_closed()

    def _open_stream(self, method: Any) -> Any:
        try:
            return method(metadata=self._metadata, wait_for_ready=False)
        except grpc.aio.UsageError:
            self._raise_closed()

    async def _answer(self, waiting: Awaitable[T]) -> T:
        try:
            return await waiting
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, peer=self.address) from None
        except grpc.aio.UsageError:
            self._raise_closed()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._raise_closed()  # the call was cancelled, not the caller: our own channel was closed

    def _raise_closed(self) -> NoReturn:
        raise engine_failed(self.address, "the connection was closed") from None

    def _release_late(self, leg_id: str) -> None:
        task = asyncio.create_task(self._release_unseen(leg_id), name=f"late release of {leg_id} on {self.address}")
        self._late_releases.add(task)
        task.add_done_callback(self._late_releases.discard)

    async def _release_unseen(self, leg_id: str) -> None:
        for _ in range(LATE_RELEASE_ATTEMPT_COUNT):
            try:
                await self.release_kv(leg_id, timeout_s=RELEASE_TIMEOUT_S)
                return
            except BatonError as error:
                if error.reason is Reason.UNAUTHENTICATED:
                    return  # then nothing was granted either
                logger.info("a prefill given up on %s was not released: %s", self.address, error)
                await asyncio.sleep(LATE_RELEASE_PAUSE_S)
            except asyncio.CancelledError:
                return  # the channel was closed: the worker is gone or we are
