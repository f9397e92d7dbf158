"""The golden server's gRPC side: Baton's own GenerationService, answering from the script.

The messages of an answer are made before they are due, so that at the due time only the write is left. The stamp is
taken just before it; what gRPC needs to put it on the wire is on the reader's bill.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc
import grpc.aio

from baton.errors import BatonError, Reason, StatusName
from baton.status import abort
from baton.v1 import generation_pb2 as pb
from bench.generator.golden import TOKEN_ID, WORD, Answer, Ending, GoldenRecord, GoldenScript, prompt_digest
from bench.generator.golden import prompt_token_count as count_prompt
from bench.generator.golden_http import STALL_LIMIT_S

DEFAULT_OUTPUT_TOKEN_COUNT = 16
WORKER_ID = "golden"
KV_BYTES_PER_TOKEN = 1000
"""What the phases report as moved, for each token of the prompt: a number to be found again in a report."""


class GoldenService:
    """One per process. ``records`` is bounded by its maker."""

    def __init__(self, script: GoldenScript, records: deque[GoldenRecord], *, model: str) -> None:
        self._script = script
        self._records = records
        self._model = model

    def add_to(self, server: grpc.aio.Server) -> None:
        generate: Any = grpc.unary_stream_rpc_method_handler(
            self.generate,
            request_deserializer=pb.GenerateRequest.FromString,
            response_serializer=None,  # bytes: serialised before they are due
        )
        check: Any = grpc.unary_unary_rpc_method_handler(_is_serving)
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("baton.v1.GenerationService", {"Generate": generate}),
                grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),
            )
        )

    async def generate(self, request: pb.GenerateRequest, context: Any) -> None:
        loop = asyncio.get_running_loop()
        received_at = loop.time()
        prompt = _prompt(request)
        stop = request.stop
        wanted = (
            stop.max_output_token_count if stop.HasField("max_output_token_count") else DEFAULT_OUTPUT_TOKEN_COUNT
        )
        if not prompt or wanted < 1:
            await abort(
                context, BatonError(Reason.INVALID_REQUEST, StatusName.INVALID_ARGUMENT, "no prompt or no token")
            )
        record = GoldenRecord(
            protocol="grpc",
            prompt_digest=prompt_digest(prompt),
            prompt_token_count=count_prompt(prompt),
            received_at_s=received_at,
        )
        self._records.append(record)
        answer = self._script.answer(prompt, wanted)
        try:
            await self._answer(request, context, record, answer)
            record.ending = answer.ending.value
        finally:
            record.ending = record.ending or _ending_of_abort(answer, loop.time(), received_at)

    async def _answer(self, request: pb.GenerateRequest, context: Any, record: GoldenRecord, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        ending = answer.ending
        ends_at = record.received_at_s + answer.ends_after_s
        if ending is not Ending.REFUSE:
            started = pb.Started(
                generation_id=f"golden-{record.prompt_digest}",
                model=self._model,
                prompt_token_count=record.prompt_token_count,
            )
            await context.write(pb.GenerateResponse(started=started).SerializeToString())
        messages = _chunks(request, answer)
        previous_written_at = 0.0
        for due_after_s, token_count, data in zip(answer.due_after_s, answer.token_counts, messages, strict=True):
            due_at = record.received_at_s + due_after_s
            await _until(due_at)
            now = loop.time()
            record.due_at_s.append(due_at)
            record.sent_at_s.append(now)
            record.token_counts.append(token_count)
            record.held_count += previous_written_at > due_at
            await context.write(data)
            previous_written_at = loop.time()
        await _until(ends_at)
        match ending:
            case Ending.REFUSE:
                refusal = "refused, as the script says"
                await abort(context, BatonError(Reason.QUEUE_FULL, StatusName.RESOURCE_EXHAUSTED, refusal))
            case Ending.ERROR:
                await abort(context, BatonError(Reason.ENGINE_FAILED, StatusName.ABORTED, "as the script says"))
            case Ending.DISCONNECT:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "as the script says")
            case Ending.STALL:
                await asyncio.sleep(STALL_LIMIT_S)
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "nobody left a stalled answer")
            case _:
                await context.write(self._finished(record, answer).SerializeToString())

    def _finished(self, record: GoldenRecord, answer: Answer) -> pb.GenerateResponse:
        ttft_s = answer.due_after_s[0] if answer.due_after_s else answer.ends_after_s
        phases = pb.PhaseTimings(
            kv_transfer_byte_count=KV_BYTES_PER_TOKEN * record.prompt_token_count,
            prefill_worker_id=WORKER_ID,
            decode_worker_id=WORKER_ID,
            attempt_count=1,
            placement_mode=pb.PLACEMENT_MODE_SPLIT,
            placement_reason="golden",
            handover_mode=pb.HANDOVER_MODE_NONE,
        )
        # The plan's own times: all of the time to the first token is prefill, the rest decode.
        for duration, seconds in (
            (phases.prefill, ttft_s),
            (phases.decode, max(0.0, answer.ends_after_s - ttft_s)),
            (phases.time_to_first_token, ttft_s),
        ):
            duration.FromNanoseconds(round(seconds * 1e9))
        for duration in (phases.queue, phases.handoff_wait, phases.kv_transfer, phases.decode_wait):
            duration.SetInParent()
        return pb.GenerateResponse(
            finished=pb.Finished(
                reason=pb.FINISH_REASON_MAX_OUTPUT_TOKENS,
                usage=pb.Usage(
                    prompt_token_count=record.prompt_token_count, output_token_count=record.output_token_count
                ),
                phases=phases,
            )
        )


def _ending_of_abort(answer: Answer, now: float, received_at: float) -> str:
    """An abort raises, and so does a caller who leaves: what is scripted to end the answer did so if it was due."""
    is_scripted = answer.ending in (Ending.REFUSE, Ending.ERROR, Ending.DISCONNECT)
    return answer.ending.value if is_scripted and now >= received_at + answer.ends_after_s else "left"


def _prompt(request: pb.GenerateRequest) -> list[int] | str:
    match request.WhichOneof("prompt"):
        case "token_ids":
            return list(request.token_ids.ids)
        case "chat":
            return "\n".join(message.content for message in request.chat.messages)
        case _:
            return str(request.text)


def _chunks(request: pb.GenerateRequest, answer: Answer) -> list[bytes]:
    content = request.output.content
    wants_ids = content in (pb.OutputOptions.CONTENT_TOKEN_IDS, pb.OutputOptions.CONTENT_BOTH)
    wants_text = content != pb.OutputOptions.CONTENT_TOKEN_IDS
    messages: list[bytes] = []
    first_token_index = 0
    for token_count in answer.token_counts:
        chunk = pb.Chunk(
            first_token_index=first_token_index,
            text=WORD * token_count if wants_text else "",
            token_ids=[TOKEN_ID] * token_count if wants_ids else (),
            token_count=token_count,
        )
        messages.append(pb.GenerateResponse(chunk=chunk).SerializeToString())
        first_token_index += token_count
    return messages


async def _until(at_s: float) -> None:
    """Sleeps until loop time ``at_s``; a loop that is late by then is not made later by another round."""
    loop = asyncio.get_running_loop()
    if at_s <= loop.time():
        return
    done = loop.create_future()
    timer = loop.call_at(at_s, _wake, done)
    try:
        await done
    finally:
        timer.cancel()


def _wake(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


async def _is_serving(request: bytes, context: Any) -> bytes:
    """``grpc.health.v1.Health/Check``, by hand as the client has it: field 1 (status) = 1 (SERVING)."""
    return b"\x08\x01"
