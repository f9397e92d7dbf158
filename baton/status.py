"""BatonError to gRPC's rich status and back: the one place where errors cross the wire.

A status carries its code and message and, in ``grpc-status-details-bin``, a ``google.rpc.Status`` with one
``ErrorInfo`` (domain "baton"), and where they apply ``BadRequest`` and ``RetryInfo``. The four messages are
built here in a private descriptor pool, wire-compatible with googleapis-common-protos: a client needs grpcio
and protobuf alone, and nothing collides with a copy of google.rpc that some other package brings.

Never decides whether to retry, and never invents a reason the peer did not give without saying so.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc
from google.protobuf import (
    any_pb2,
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    message,
    message_factory,
)

from baton.errors import BatonError, FieldViolation, Reason, StatusName
from baton.handshake import Security, tls_failure

DOMAIN = "baton"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"

# Details travel, as base64, in HTTP/2 trailers, of which gRPC and some proxies allow 8 KiB in all.
MAX_MESSAGE_BYTES = 512
MAX_METADATA_COUNT = 8
MAX_METADATA_VALUE_BYTES = 128
MAX_VIOLATION_COUNT = 8
MAX_VIOLATION_FIELD_BYTES = 64
MAX_VIOLATION_BYTES = 256

_TYPE_PREFIX = "type.googleapis.com/"
_Field = descriptor_pb2.FieldDescriptorProto

RpcStatus = tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]


def _field(name: str, number: int, kind: int, *, type_name: str = "", is_repeated: bool = False) -> Any:
    return _Field(
        name=name,
        number=number,
        type=kind,  # type: ignore[arg-type]  # the enum's int, as protobuf's own generated code passes it
        type_name=type_name or None,
        label=_Field.LABEL_REPEATED if is_repeated else _Field.LABEL_OPTIONAL,
    )


def _message_classes() -> tuple[type[Any], type[Any], type[Any], type[Any]]:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="baton/status_details.proto",
        package="google.rpc",
        syntax="proto3",
        dependency=["google/protobuf/any.proto", "google/protobuf/duration.proto"],
    )
    text, submessage = _Field.TYPE_STRING, _Field.TYPE_MESSAGE

    status = file.message_type.add(name="Status")
    status.field.append(_field("code", 1, _Field.TYPE_INT32))
    status.field.append(_field("message", 2, text))
    status.field.append(_field("details", 3, submessage, type_name=".google.protobuf.Any", is_repeated=True))

    info = file.message_type.add(name="ErrorInfo")
    info.field.append(_field("reason", 1, text))
    info.field.append(_field("domain", 2, text))
    info.field.append(
        _field("metadata", 3, submessage, type_name=".google.rpc.ErrorInfo.MetadataEntry", is_repeated=True)
    )
    entry = info.nested_type.add(name="MetadataEntry")
    entry.options.map_entry = True
    entry.field.append(_field("key", 1, text))
    entry.field.append(_field("value", 2, text))

    bad_request = file.message_type.add(name="BadRequest")
    bad_request.field.append(
        _field(
            "field_violations",
            1,
            submessage,
            type_name=".google.rpc.BadRequest.FieldViolation",
            is_repeated=True,
        )
    )
    violation = bad_request.nested_type.add(name="FieldViolation")
    violation.field.append(_field("field", 1, text))
    violation.field.append(_field("description", 2, text))

    retry = file.message_type.add(name="RetryInfo")
    retry.field.append(_field("retry_delay", 1, submessage, type_name=".google.protobuf.Duration"))

    pool.Add(file)

    def message_class(name: str) -> type[Any]:
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"google.rpc.{name}"))

    return (
        message_class("Status"),
        message_class("ErrorInfo"),
        message_class("BadRequest"),
        message_class("RetryInfo"),
    )


_Status, _ErrorInfo, _BadRequest, _RetryInfo = _message_classes()


def to_rpc_status(error: BatonError) -> RpcStatus:
    """The code, the message and the trailing metadata of ``error``, each bounded to keep headers small."""
    code = grpc.StatusCode[error.status.value]
    text = _cut(error.message, MAX_MESSAGE_BYTES)
    status = _Status(code=code.value[0], message=text)

    info = _ErrorInfo(reason=error.reason.value, domain=DOMAIN)
    for key, value in list(error.metadata.items())[:MAX_METADATA_COUNT]:
        info.metadata[key] = _cut(value, MAX_METADATA_VALUE_BYTES)
    _pack(status, info)

    if error.violations:
        bad_request = _BadRequest()
        for violation in error.violations[:MAX_VIOLATION_COUNT]:
            bad_request.field_violations.add(
                field=_cut(violation.field, MAX_VIOLATION_FIELD_BYTES),
                description=_cut(violation.description, MAX_VIOLATION_BYTES),
            )
        left_out_count = len(error.violations) - MAX_VIOLATION_COUNT
        if left_out_count > 0:
            bad_request.field_violations.add(field="", description=f"{left_out_count} more not listed")
        _pack(status, bad_request)

    trailers: list[tuple[str, str | bytes]] = []
    if error.retry_after_s is not None:
        retry_after_ms = max(0, math.ceil(error.retry_after_s * 1000))
        retry = _RetryInfo()
        retry.retry_delay.FromMilliseconds(retry_after_ms)
        _pack(status, retry)
        trailers.append((PUSHBACK_KEY, str(retry_after_ms)))
    trailers.append((DETAILS_KEY, status.SerializeToString()))
    return code, text, tuple(trailers)


async def abort(context: Any, error: BatonError) -> NoReturn:
    """Ends the call of ``context`` (a ``grpc.aio.ServicerContext``) with ``error``. Always raises."""
    code, text, trailers = to_rpc_status(error)
    await context.abort(code, text, trailers)
    raise AssertionError("context.abort returned")


def from_rpc_error(error: grpc.RpcError, *, peer: str = "", security: Security | None = None) -> BatonError:
    """What a failed call says, sync or asyncio. ``peer`` (a worker id or an address) names the other side,
    ``security`` what is spoken with it, if known.

    Without baton details the failure is the transport's or somebody else's: a lost connection is
    ENGINE_FAILED with status UNAVAILABLE (``HandshakeFailed`` where TLS says why), a deadline DEADLINE_EXCEEDED
    with phase "unknown", an oversized message INVALID_REQUEST; what fits nothing is INTERNAL.
    """
    call: Any = error  # grpc's stubs do not say that the error of a call has these three methods
    code: grpc.StatusCode = call.code()
    text: str = call.details() or ""
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            parsed = _from_details(code, text, value)
            if parsed is not None:
                return parsed
    return _without_details(code, text, peer, security)


def _from_details(code: grpc.StatusCode, text: str, data: bytes) -> BatonError | None:
    """None when these are not Baton's details."""
    info: Any = None
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    try:
        status = _Status.FromString(data)
        for detail in status.details:
            match detail.type_url.removeprefix(_TYPE_PREFIX):
                case "google.rpc.ErrorInfo":
                    candidate = _ErrorInfo.FromString(detail.value)
                    info = candidate if candidate.domain == DOMAIN else info
                case "google.rpc.BadRequest":
                    for violation in _BadRequest.FromString(detail.value).field_violations:
                        violations.append(FieldViolation(violation.field, violation.description))
                case "google.rpc.RetryInfo":
                    retry_after_s = _RetryInfo.FromString(detail.value).retry_delay.ToMilliseconds() / 1000
    except message.DecodeError:
        return None
    if info is None:
        return None
    metadata = dict(info.metadata)
    try:
        reason = Reason(info.reason)
    except ValueError:
        # The enum is open: a newer server may send what this client does not know. The name is kept.
        metadata["unknown_reason"] = info.reason
        reason = _reason_of(code)
    return BatonError(
        reason,
        _status_name(code),
        text,
        metadata=metadata,
        violations=violations,
        retry_after_s=retry_after_s,
    )


def to_status_bytes(error: BatonError) -> bytes:
    """``error`` as a serialised google.rpc.Status, for where it is a part of a message. See ``from_status_bytes``."""
    _, _, trailers = to_rpc_status(error)
    return next(value for key, value in trailers if key == DETAILS_KEY and isinstance(value, bytes))


def from_status_bytes(data: bytes, *, peer: str = "") -> BatonError:
    """The error that ``to_status_bytes`` wrote; INTERNAL where it is none."""
    try:
        status = _Status.FromString(data)
        code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        found = _from_details(code, status.message, data)
    except (message.DecodeError, StopIteration):
        found = None
    if found is None:
        return _without_details(grpc.StatusCode.INTERNAL, "an error this side does not know", peer)
    return found


def _without_details(code: grpc.StatusCode, text: str, peer: str, security: Security | None = None) -> BatonError:
    at = f" {peer}" if peer else ""
    if code is grpc.StatusCode.UNAVAILABLE and (failure := tls_failure(text, peer, security)) is not None:
        return failure
    is_broken_stream = code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and (
        "RST_STREAM" in text or "Stream removed" in text
    )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) or is_broken_stream:
        return BatonError(
            Reason.ENGINE_FAILED,
            StatusName.UNAVAILABLE,
            f"lost the connection to the server{at}: {_cut(text, MAX_METADATA_VALUE_BYTES)}",
            metadata={"worker_id": peer, "transport": code.name},
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return BatonError(
            Reason.DEADLINE_EXCEEDED,
            StatusName.DEADLINE_EXCEEDED,
            f"the deadline passed before the server{at} answered",
            metadata={"phase": "unknown", "emitted_token_count": "unknown"},
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return BatonError(
            Reason.INVALID_REQUEST,
            StatusName.INVALID_ARGUMENT,
            f"the message is too large: {_cut(text, MAX_METADATA_VALUE_BYTES)}",
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        text = "it serves another API or another version; is this the right port? Public and admin API have two"
    return BatonError(
        _reason_of(code),
        _status_name(code),
        f"the server{at} answered {code.name} without saying why: {_cut(text, MAX_METADATA_VALUE_BYTES)}",
        metadata={"transport": code.name},
    )


def _reason_of(code: grpc.StatusCode) -> Reason:
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return Reason.INVALID_REQUEST
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Reason.QUEUE_FULL
        case grpc.StatusCode.UNAVAILABLE:
            return Reason.ENGINE_FAILED
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return Reason.DEADLINE_EXCEEDED
        case grpc.StatusCode.UNAUTHENTICATED:
            return Reason.UNAUTHENTICATED
    return Reason.INTERNAL


def _status_name(code: grpc.StatusCode) -> StatusName:
    return StatusName[code.name] if code.name in StatusName.__members__ else StatusName.INTERNAL


def _pack(status: Any, detail: Any) -> None:
    status.details.add(type_url=_TYPE_PREFIX + detail.DESCRIPTOR.full_name, value=detail.SerializeToString())


def _cut(text: str, max_bytes: int) -> str:
    data = text.encode()
    return text if len(data) <= max_bytes else data[: max_bytes - 3].decode(errors="ignore") + "…"
