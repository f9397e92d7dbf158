"""All decodes of this router on one worker, on one stream. Protobuf stops here.

Owns the stream: opened with the first leg, kept for the next ones, opened anew after it broke. What a message brings
goes straight to the sinks of its legs: no queue and no task in between. A broken stream fails every leg on it.

The worker is told how many messages were dealt with only after what they woke has run, so that a router that falls
behind gets fewer and larger messages instead of a longer queue.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from baton.errors import BatonError, StatusName, deadline_exceeded, engine_failed, internal
from baton.leg import DecodeDone, DecodeOrder, KvAdopted, Stepped
from baton.request import LegFinish
from baton.status import from_status_bytes
from baton.worker.v1 import worker_pb2 as pb
from router.leg_messages_client import decode_request, events_from_proto, finish_of, kv_adopted, logprobs_of
from router.worker_client import DecodeSink

TELL_AFTER_COUNT = 3
"""Messages dealt with that the worker is told of at once; it sends at most 4 ahead."""
TURN_LEG_COUNT = 64
"""Legs dealt with before what they woke, and everything else on the loop, has its turn."""

MAX_STARTS_BYTES = 64 * 1024
"""No order is added to a message beyond so much, and a larger one gets a call of its own: a worker refuses messages
of 1 MiB with the whole stream that they are on, and one request must not take the others along."""

logger = logging.getLogger(__name__)

Answer = Callable[[Awaitable[Any]], Awaitable[Any]]


class _Leg:
    __slots__ = ("ended", "number", "sink")

    def __init__(self, number: int, sink: DecodeSink) -> None:
        self.number = number
        self.sink = sink
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class LegStreamClient:
    """One per worker client."""

    def __init__(
        self, open_call: Callable[[], Any], open_leg: Callable[[Any, float], Any], answer: Answer, address: str
    ) -> None:
        """``open_call`` opens the stream, ``open_leg`` a call for one order and its time. ``answer`` awaits something
        of them, and raises ``BatonError`` for what gRPC raises."""
        self._open_call = open_call
        self._open_leg = open_leg
        self._answer = answer
        self._address = address
        self._stream: _Stream | None = None

    async def decode(self, order: DecodeOrder, *, timeout_s: float, sink: DecodeSink) -> None:
        """See ``WorkerClient``. Cancelled, the leg is aborted on the worker."""
        request = decode_request(order)
        if request.ByteSize() > MAX_STARTS_BYTES:
            await self._decode_alone(request, timeout_s, sink)
            return
        stream = self._stream
        if stream is None or stream.is_broken:
            stream = self._stream = _Stream(self._open_call(), self._answer, self._address)
        leg = stream.start(request, timeout_s, sink)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                await leg.ended
        except TimeoutError:
            if not limit.expired():
                raise
            raise deadline_exceeded("decode", 0) from None
        finally:
            stream.leave(leg)

    async def _decode_alone(self, request: Any, timeout_s: float, sink: DecodeSink) -> None:
        """In a call of its own."""
        call = self._open_leg(request, timeout_s)
        try:
            while (message := await self._answer(call.read())) is not grpc.aio.EOF:
                for event in events_from_proto(message):
                    match event:
                        case Stepped():
                            sink.tokens(event.token_ids, event.logprobs)
                        case KvAdopted():
                            sink.adopted(event)
                        case DecodeDone():
                            sink.done(event.finish)
                            return
        finally:
            call.cancel()  # of no effect on a call that is over

    async def close(self) -> None:
        """Fails every leg. Idempotent."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()


class _Stream:
    def __init__(self, call: Any, answer: Answer, address: str) -> None:
        self._call = call
        self._answer = answer
        self._address = address
        # The mutable state: legs by number, what is to be said, and how much was heard.
        self._legs: dict[int, _Leg] = {}
        self._numbers = itertools.count(1)
        self._starts: dict[int, Any] = {}
        self._cancels: list[int] = []
        self._taken_count = 0
        self._told_count = 0
        self._may_write = asyncio.Event()
        self.is_broken = False
        self._writer = asyncio.create_task(self._write(), name=f"writer of the legs on {address}")
        self._reader = asyncio.create_task(self._read(), name=f"reader of the legs on {address}")

    def start(self, order: Any, timeout_s: float, sink: DecodeSink) -> _Leg:
        leg = _Leg(next(self._numbers), sink)
        self._legs[leg.number] = leg
        self._starts[leg.number] = pb.LegStart(leg_number=leg.number, order=order, timeout_s=timeout_s)
        self._may_write.set()
        return leg

    def leave(self, leg: _Leg) -> None:
        """Aborts the leg unless it is over."""
        if self._legs.pop(leg.number, None) is None:
            return
        if self._starts.pop(leg.number, None) is None:  # else the worker never heard of it
            self._cancels.append(leg.number)
            self._may_write.set()

    async def close(self) -> None:
        self._break(engine_failed(self._address, "the connection was closed"))
        running = (self._writer, self._reader)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # Saying

    async def _write(self) -> None:
        try:
            while True:
                untold_count = self._taken_count - self._told_count
                while not (self._starts or self._cancels or untold_count >= TELL_AFTER_COUNT):
                    self._may_write.clear()
                    await self._may_write.wait()
                    untold_count = self._taken_count - self._told_count
                starts = self._next_starts()
                cancels, self._cancels = self._cancels, []
                self._told_count = self._taken_count
                await self._call.write(
                    pb.DecodeManyRequest(
                        starts=starts,
                        cancelled_leg_numbers=cancels,
                        taken_response_count=self._told_count,
                    )
                )
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            return  # the stream is over, and whoever reads it is told why

    def _next_starts(self) -> list[Any]:
        """Those that fit into one message, in order; at least one, if there is any."""
        starts: list[Any] = []
        byte_count = 0
        for number, start in list(self._starts.items()):
            byte_count += start.ByteSize()
            if starts and byte_count > MAX_STARTS_BYTES:
                break
            starts.append(self._starts.pop(number))
        return starts

    # Hearing

    async def _read(self) -> None:
        error = engine_failed(self._address, "ended its stream of decodes without saying why")
        try:
            while (message := await self._answer(self._call.read())) is not grpc.aio.EOF:
                await self._deal_with(message)
                self._taken_count += 1
                if self._taken_count - self._told_count >= TELL_AFTER_COUNT:
                    self._may_write.set()
        except BatonError as failure:
            error = failure
        except Exception as bug:
            logger.exception("a bug in reading the legs on %s", self._address)
            error = internal(f"reading a stream of decodes raised {type(bug).__name__}")
        finally:
            self._break(error)
            self._writer.cancel()

    async def _deal_with(self, message: Any) -> None:
        """In turns; the last is over when what it woke has run."""
        legs = self._legs
        numbers, token_ids, counts = list(message.leg_numbers), list(message.token_ids), list(message.token_counts)
        if (sum(counts) if counts else len(numbers)) != len(token_ids) or (counts and len(counts) != len(numbers)):
            raise internal(f"worker at {self._address} sent tokens that belong to no leg")
        for each in message.news:
            self._deal_with_news(each)
        begin = 0
        for start in range(0, len(numbers), TURN_LEG_COUNT):
            end = start + TURN_LEG_COUNT
            if counts:
                for number, count in zip(numbers[start:end], counts[start:end], strict=True):
                    leg = legs.get(number)
                    if leg is not None:
                        leg.sink.tokens(tuple(token_ids[begin : begin + count]), ())
                    begin += count
            else:
                for number, token_id in zip(numbers[start:end], token_ids[start:end], strict=True):
                    leg = legs.get(number)
                    if leg is not None:
                        leg.sink.tokens((token_id,), ())
            await asyncio.sleep(0)

    def _deal_with_news(self, news: Any) -> None:
        leg = self._legs.get(news.leg_number)
        if leg is None:
            return
        try:
            finish = _tell_events(news.events, leg.sink)
        except BatonError as error:
            self._end(leg, error)
            return
        if news.failure:
            self._end(leg, from_status_bytes(news.failure, peer=self._address))
        elif finish is not None:
            leg.sink.done(finish)
            self._end(leg, None)

    def _end(self, leg: _Leg, error: BatonError | None) -> None:
        self._legs.pop(leg.number, None)
        if leg.ended.done():
            return
        if error is None:
            leg.ended.set_result(None)
        else:
            leg.ended.set_exception(error)

    def _break(self, error: BatonError) -> None:
        if self.is_broken:
            return
        self.is_broken = True
        self._call.cancel()
        for leg in list(self._legs.values()):
            # Each its own: an exception that is raised in many tasks collects the frames of all.
            self._end(leg, BatonError(error.reason, StatusName(error.status), error.message, metadata=error.metadata))


def _tell_events(events: Any, sink: DecodeSink) -> LegFinish | None:
    """Tells ``sink`` but for the end, which is returned. Raises INTERNAL for an end that is not known here."""
    has_step = events.HasField("step")
    if events.HasField("adopted"):
        sink.adopted(kv_adopted(events.adopted, is_with_tokens=has_step))
    if has_step:
        sink.tokens(tuple(events.step.token_ids), tuple(map(logprobs_of, events.step.logprobs)))
    if not events.HasField("finished"):
        return None
    finish = finish_of(events.finished)
    if finish is None:
        raise internal("a decode ended in a way this router does not know")
    return finish
