"""Errors survive the wire, with and without googleapis-common-protos on the other side."""

from __future__ import annotations

import copy
import subprocess
import sys

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from baton import errors, status
from baton.errors import BatonError, FieldViolation, Reason, StatusName

EVERY_ERROR = [
    errors.invalid_request([FieldViolation("stop.max", "must be positive"), FieldViolation("b", "c")]),
    errors.prompt_too_long(9000, 8191),
    errors.model_not_found("gpt", ["smollm2", "other"]),
    errors.queue_full(64, 64, 1.25),
    errors.no_worker("decode", 0),
    errors.cache_too_small(900, 60, 50),
    errors.no_room(60, 50, 0.25),
    errors.attempts_exhausted(3, 0, "decode", "worker d0: lost"),
    errors.attempts_exhausted(3, 7, "decode", "worker d0: lost"),
    errors.deadline_exceeded("decode", 12),
    errors.draining(),
    errors.ticket_refused("signature"),
    errors.engine_failed("d0", "engine died"),
    errors.unauthenticated(),
    errors.no_api_key(),
    errors.permission_denied("the key is another tenant's"),
    errors.resume_unknown(),
    errors.resume_denied(),
    errors.resume_too_late(3, 9),
    errors.attached_elsewhere(),
    errors.too_many_resumable(10, 10, 1.5),
    errors.stalled("prefill", 60, 0),
    errors.stalled("decode", 60, 4),
    errors.reader_too_slow(1000, 900, 12),
    errors.internal("unreachable", "gen-1"),
]


def over_the_wire(error: BatonError) -> AioRpcError:
    code, text, trailers = status.to_rpc_status(error)
    return AioRpcError(code, Metadata(), Metadata(*trailers), details=text)


def facts(error: BatonError) -> tuple[object, ...]:
    return (error.reason, error.status, error.message, error.metadata, error.violations, error.retry_after_s)


def test_the_errors_tried_here_cover_every_reason() -> None:
    assert {error.reason for error in EVERY_ERROR} == set(Reason)


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda e: f"{e.reason.name}-{e.status.name}")
def test_every_error_comes_back_from_the_wire_as_it_left(error: BatonError) -> None:
    assert facts(status.from_rpc_error(over_the_wire(error))) == facts(error)


@pytest.mark.parametrize(
    ("error", "kind", "is_retryable"),
    [
        (errors.invalid_request([FieldViolation("a", "b")]), errors.InvalidRequest, False),
        (errors.prompt_too_long(9, 8), errors.PromptTooLong, False),
        (errors.model_not_found("gpt", ["tiny"]), errors.ModelNotFound, False),
        (errors.queue_full(1, 1, 1.0), errors.Overloaded, True),
        (errors.too_many_resumable(1, 1, 1.0), errors.Overloaded, True),
        (errors.no_worker("decode", 0), errors.Unavailable, True),
        (errors.draining(), errors.Unavailable, True),
        (errors.attempts_exhausted(3, 0, "decode", "lost"), errors.Unavailable, True),
        (errors.attempts_exhausted(3, 7, "decode", "lost"), errors.Interrupted, False),
        (errors.stalled("decode", 60, 4), errors.Interrupted, False),
        (errors.deadline_exceeded("decode", 12), errors.DeadlineExceeded, False),
        (errors.no_api_key(), errors.Unauthenticated, False),
        (errors.permission_denied("no"), errors.NotPermitted, False),
        (errors.resume_unknown(), errors.ResumeFailed, False),
        (errors.resume_denied(), errors.ResumeFailed, False),
        (errors.resume_too_late(3, 9), errors.ResumeFailed, False),
        (errors.attached_elsewhere(), errors.ResumeFailed, False),
        (errors.internal("x"), errors.InternalError, False),
    ],
)
def test_every_error_is_of_the_class_that_says_what_to_do_here_and_over_the_wire(
    error: BatonError, kind: type[BatonError], is_retryable: bool
) -> None:
    for each in (error, status.from_rpc_error(over_the_wire(error)), copy.copy(error)):
        assert (type(each), each.is_retryable) == (kind, is_retryable)
        assert facts(each) == facts(error)
    assert repr(error).startswith(f"<{kind.__name__} {error.status.value}/{error.reason.value}: ")


def test_a_class_of_its_own_is_kept() -> None:
    class Ours(BatonError):
        pass

    assert type(Ours(Reason.DRAINING, StatusName.UNAVAILABLE, "ours")) is Ours


def test_googleapis_common_protos_reads_what_baton_writes() -> None:
    error_details_pb2 = pytest.importorskip("google.rpc.error_details_pb2")
    status_pb2 = pytest.importorskip("google.rpc.status_pb2")
    code, text, trailers = status.to_rpc_status(errors.queue_full(5, 4, 1.5))
    rich = status_pb2.Status.FromString(dict(trailers)[status.DETAILS_KEY])
    assert (rich.code, rich.message) == (code.value[0], text)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert rich.details[0].Unpack(info)
    assert rich.details[1].Unpack(retry)
    assert (info.reason, info.domain, info.metadata["queue_limit"]) == ("QUEUE_FULL", "baton", "4")
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert dict(trailers)["grpc-retry-pushback-ms"] == "1500"

    broken = status.to_rpc_status(errors.invalid_request([FieldViolation("prompt", "is empty")]))
    bad_request = error_details_pb2.BadRequest()
    assert status_pb2.Status.FromString(dict(broken[2])[status.DETAILS_KEY]).details[1].Unpack(bad_request)
    assert bad_request.field_violations[0].field == "prompt"


def test_reading_an_error_needs_no_google_rpc_package() -> None:
    program = (
        "import sys; sys.modules['google.rpc'] = None; sys.modules['grpc_status'] = None\n"
        "import grpc\n"
        "from grpc.aio import AioRpcError, Metadata\n"
        "from baton import errors, status\n"
        "code, text, trailers = status.to_rpc_status(errors.deadline_exceeded('prefill', 3))\n"
        "back = status.from_rpc_error(AioRpcError(code, Metadata(), Metadata(*trailers), details=text))\n"
        "print(back.reason.name, back.metadata['phase'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["DEADLINE_EXCEEDED", "prefill"]


def test_details_stay_small_however_large_the_error() -> None:
    error = BatonError(
        Reason.INVALID_REQUEST,
        StatusName.INVALID_ARGUMENT,
        "é" * 100_000,
        metadata={f"key{i}": "v" * 10_000 for i in range(100)},
        violations=[FieldViolation("f" * 1000, "d" * 10_000) for _ in range(1000)],
    )
    code, text, trailers = status.to_rpc_status(error)
    data = dict(trailers)[status.DETAILS_KEY]
    assert len(data) * 4 / 3 + len(text) < 7_000
    assert len(text.encode()) <= status.MAX_MESSAGE_BYTES
    back = status.from_rpc_error(AioRpcError(code, Metadata(), Metadata(*trailers), details=text))
    assert back.violations[-1].description == f"{1000 - status.MAX_VIOLATION_COUNT} more not listed"


def transport_error(code: grpc.StatusCode, text: str, *trailers: tuple[str, bytes]) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(*trailers), details=text)


@pytest.mark.parametrize(
    ("code", "text", "reason", "status_name"),
    [
        ("UNAVAILABLE", "Socket closed", Reason.ENGINE_FAILED, StatusName.UNAVAILABLE),
        ("CANCELLED", "Received RST_STREAM", Reason.ENGINE_FAILED, StatusName.UNAVAILABLE),
        ("INTERNAL", "Received RST_STREAM with error code 2", Reason.ENGINE_FAILED, StatusName.UNAVAILABLE),
        ("INTERNAL", "Exception deserializing", Reason.INTERNAL, StatusName.INTERNAL),
        ("UNKNOWN", "Unexpected <class 'KeyError'>", Reason.INTERNAL, StatusName.INTERNAL),
        ("UNIMPLEMENTED", "Method not found!", Reason.INTERNAL, StatusName.INTERNAL),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Reason.DEADLINE_EXCEEDED, StatusName.DEADLINE_EXCEEDED),
        ("RESOURCE_EXHAUSTED", "message larger than max", Reason.INVALID_REQUEST, StatusName.INVALID_ARGUMENT),
        ("RESOURCE_EXHAUSTED", "Concurrent RPC limit", Reason.QUEUE_FULL, StatusName.RESOURCE_EXHAUSTED),
        ("UNAUTHENTICATED", "no", Reason.UNAUTHENTICATED, StatusName.UNAUTHENTICATED),
    ],
)  # fmt: skip
def test_a_failure_without_details_becomes_a_typed_error(
    code: str, text: str, reason: Reason, status_name: StatusName
) -> None:
    error = status.from_rpc_error(transport_error(grpc.StatusCode[code], text), peer="prefill-0")
    assert (error.reason, error.status) == (reason, status_name)
    if reason is Reason.ENGINE_FAILED:
        assert error.metadata["worker_id"] == "prefill-0"


def test_garbage_details_are_not_taken_for_batons() -> None:
    error = status.from_rpc_error(
        transport_error(grpc.StatusCode.UNAVAILABLE, "gone", (status.DETAILS_KEY, b"\xff\xff\xff"))
    )
    assert error.reason is Reason.ENGINE_FAILED


def test_a_reason_of_a_newer_server_is_tolerated_and_kept() -> None:
    info = status._ErrorInfo(reason="MOON_PHASE", domain="baton")
    rich = status._Status(code=14, message="later")
    status._pack(rich, info)
    error = status.from_rpc_error(
        transport_error(grpc.StatusCode.UNAVAILABLE, "later", (status.DETAILS_KEY, rich.SerializeToString()))
    )
    assert (error.status, error.metadata["unknown_reason"]) == (StatusName.UNAVAILABLE, "MOON_PHASE")


def test_details_of_another_domain_are_not_batons() -> None:
    rich = status._Status(code=14, message="later")
    status._pack(rich, status._ErrorInfo(reason="NO_WORKER", domain="example.com"))
    error = status.from_rpc_error(
        transport_error(grpc.StatusCode.UNAVAILABLE, "x", (status.DETAILS_KEY, rich.SerializeToString()))
    )
    assert error.reason is Reason.ENGINE_FAILED
