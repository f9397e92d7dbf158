"""One stream of many legs on the wire: starts and cancels in, what comes of every leg out. Protobuf stops here.

Owns the tasks of the stream's legs and the one that writes. Each leg says what it has to its outlet and goes on; the
writer takes what is there, as soon as there is something, and as long as the reader is at most ``AHEAD_COUNT``
messages behind. So what one engine step brought to all legs is one message, a reader that keeps up gets every step
as it is made, and one that does not gets fewer and larger messages, without holding up a leg.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc.aio

from baton.errors import BatonError, FieldViolation, invalid_request
from baton.leg import DecodeEvent, DecodeOrder
from baton.status import to_status_bytes
from baton.worker.v1 import worker_pb2
from decode_worker.leg_messages_proto import events_of, order_from_proto
from decode_worker.outlet import Outlet, Waiting
from decode_worker.worker import DecodeWorker
from engine.service import MAX_CALL_S, failing_as_ours

AHEAD_COUNT = 4
"""Messages that may be on their way to the reader: the next one, and three whose taking was not told yet (readers
tell it of three at a time: each telling is a message, too)."""
PHASE = "decode"


class LegStream:
    """``run`` once."""

    def __init__(self, worker: DecodeWorker, context: Any) -> None:
        self._worker = worker
        self._context = context
        # The mutable state: legs by number, what they have to say, and how far the reader is.
        self._legs: dict[int, asyncio.Task[None]] = {}
        self._outlet = Outlet()
        self._written_count = 0
        self._taken_count = 0
        self._may_write = asyncio.Event()

    async def run(self) -> None:
        """Until the caller ends the stream or is gone; then nothing of it is left."""
        writer = asyncio.create_task(self._write(), name="writer of a stream of legs")
        try:
            while (message := await self._context.read()) is not grpc.aio.EOF:
                self._take(message)
                if writer.done():
                    await writer  # the caller is gone: raises what gRPC said
        finally:
            running = [writer, *self._legs.values()]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _take(self, message: Any) -> None:
        for start in message.starts:
            self._start(start)
        for number in message.cancelled_leg_numbers:
            # AFTER the starts: a leg may be called off in the message that starts it.
            if (leg := self._legs.get(number)) is not None:
                leg.cancel()
            self._outlet.forget(number)
        if message.taken_response_count > self._taken_count:
            self._taken_count = message.taken_response_count
            self._may_write.set()

    def _start(self, start: Any) -> None:
        number = start.leg_number
        if number in self._legs:
            return  # a number is used once; the leg that has it goes on
        leg = asyncio.create_task(self._run_leg(number, start), name=f"leg {number} of a stream")
        self._legs[number] = leg
        leg.add_done_callback(lambda _: self._legs.pop(number, None))

    async def _run_leg(self, number: int, start: Any) -> None:
        try:
            if not start.timeout_s > 0:
                raise invalid_request([FieldViolation("timeout_s", "must be above 0")])
            async with (
                failing_as_ours(PHASE, min(start.timeout_s, MAX_CALL_S)),
                aclosing(self._worker.decode(self._order(start))) as events,
            ):
                async for event in events:
                    self._say(number, event)
        except BatonError as error:
            self._outlet.fail(number, error)
            self._may_write.set()

    def _order(self, start: Any) -> DecodeOrder:
        return order_from_proto(start.order)

    def _say(self, number: int, event: DecodeEvent) -> None:
        self._outlet.add(number, event)
        self._may_write.set()

    async def _write(self) -> None:
        while True:
            while not len(self._outlet) or self._written_count - self._taken_count >= AHEAD_COUNT:
                self._may_write.clear()
                await self._may_write.wait()
            # Woken by the first leg that spoke, this runs after all legs that the same engine step woke.
            await self._context.write(to_proto(self._outlet.take()))
            self._written_count += 1


def to_proto(waiting: list[Waiting]) -> Any:
    plain = [each for each in waiting if each.is_tokens_only]
    counts = [len(each.token_ids) for each in plain]
    return worker_pb2.DecodeManyResponse(
        leg_numbers=[each.leg_number for each in plain],
        token_counts=() if all(count == 1 for count in counts) else counts,
        token_ids=[token_id for each in plain for token_id in each.token_ids],
        news=[_news(each) for each in waiting if not each.is_tokens_only],
    )


def _news(waiting: Waiting) -> Any:
    events = events_of(waiting.adopted, waiting.token_ids, waiting.logprobs, waiting.finish)
    failure = b"" if waiting.failure is None else to_status_bytes(waiting.failure)
    return worker_pb2.LegNews(leg_number=waiting.leg_number, events=events, failure=failure)
