"""Messages of ResumeGenerate in the words of the resume desk. Mechanical, but for the digest of a request."""

from __future__ import annotations

import hashlib

from baton.v1 import generation_pb2 as pb
from router.resume_desk import Continuation
from router.service_messages import request_from_proto


def request_digest(message: pb.GenerateRequest) -> str:
    """SHA-256, hexadecimal, of the message as this library writes it: the same for the same content, whatever order
    and language it was sent in."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()


def next_indices_of(message: pb.ResumeGenerateRequest) -> tuple[int, ...]:
    """Of each sample."""
    return tuple(message.next_token_indices) or (message.next_token_index,)


def continuation_from_proto(message: pb.ResumeGenerateRequest) -> Continuation | None:
    if not message.HasField("continuation"):
        return None
    request, violations = request_from_proto(message.continuation.request)
    return Continuation(
        request,
        tuple(violations),
        request_digest(message.continuation.request),
        tuple(tuple(sample.ids) for sample in message.continuation.samples),
    )
