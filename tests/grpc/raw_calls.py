"""Calls without a client of ours: bytes or messages out, and all that came back, told as it was on the wire.

A helper of the conformance tests beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2
from baton.v1 import status_pb2 as baton_status_pb2

GENERATION = "baton.v1.GenerationService"
MODELS = "baton.v1.ModelService"
STATUS = "baton.v1.StatusService"
DETAILS_KEY = "grpc-status-details-bin"

METHODS: dict[str, Any] = {
    f"/{service.full_name}/{method.name}": method
    for file in (pb, model_pb2, baton_status_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every public method by its path."""


@dataclass(frozen=True)
class Outcome:
    """What a call ended with. ``messages``: all that came before."""

    code: grpc.StatusCode
    text: str
    messages: list[Any] = field(repr=False)
    trailers: dict[str, str | bytes] = field(repr=False)
    has_headers: bool
    """The server sent headers before the status: gRPC takes such a call for one that must not be repeated."""

    @property
    def details(self) -> dict[str, Any]:
        """The rich status's parts by the last word of their type, read with Google's own messages, not with ours."""
        data = self.trailers.get(DETAILS_KEY)
        if data is None:
            return {}
        assert isinstance(data, bytes)
        status = status_pb2.Status.FromString(data)
        assert status.code == self.code.value[0]
        assert status.message == self.text
        found: dict[str, Any] = {}
        for each in status.details:
            name = each.type_url.rpartition(".")[2]
            part = getattr(error_details_pb2, name)()
            assert each.Unpack(part)
            assert name not in found, f"two {name}"
            found[name] = part
        return found

    @property
    def reason(self) -> str:
        """The ErrorInfo's; empty without one."""
        info = self.details.get("ErrorInfo")
        if info is None:
            return ""
        assert info.domain == "baton"
        return str(info.reason)

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.details["ErrorInfo"].metadata)

    @property
    def violations(self) -> dict[str, str]:
        """Description by field."""
        bad_request = self.details.get("BadRequest")
        return {} if bad_request is None else {each.field: each.description for each in bad_request.field_violations}

    @property
    def finished(self) -> pb.Finished:
        assert self.code is grpc.StatusCode.OK, self
        finished: pb.Finished = self.messages[-1].finished
        return finished

    @property
    def chunks(self) -> list[pb.Chunk]:
        return [each.chunk for each in self.messages if each.WhichOneof("event") == "chunk"]

    @property
    def started(self) -> pb.Started:
        started: pb.Started = self.messages[0].started
        return started

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for chunk in self.chunks for token_id in chunk.token_ids)

    @property
    def said(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)


def response_class(method: Any) -> Any:
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(method.output_type)


async def ask(
    channel: grpc.aio.Channel,
    path: str,
    request: Message | bytes,
    *,
    timeout: float | None = 20.0,
    metadata: Sequence[tuple[str, str]] = (),
    **options: Any,
) -> Outcome:
    """One call, read to its end."""
    method = METHODS.get(path)
    make = channel.unary_stream if method is None or method.server_streaming else channel.unary_unary
    parse = bytes if method is None else response_class(method).FromString
    call: Any = make(path, request_serializer=_data, response_deserializer=parse)(
        request, timeout=timeout, metadata=tuple(metadata), **options
    )
    messages: list[Any] = []
    try:
        if method is None or method.server_streaming:
            async for message in call:
                messages.append(message)
        else:
            messages.append(await call)
    except grpc.aio.AioRpcError:
        pass  # told below, as every end is
    trailers: dict[str, str | bytes] = dict(await call.trailing_metadata() or ())
    headers = await call.initial_metadata()
    code = await call.code()
    return Outcome(code, await call.details() or "", messages, trailers, bool(headers) or bool(messages))


async def generate(channel: grpc.aio.Channel, request: Message | bytes, **options: Any) -> Outcome:
    return await ask(channel, f"/{GENERATION}/Generate", request, **options)


def _data(request: Message | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()
