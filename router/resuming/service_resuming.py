"""Messages of ResumeGenerate in the words of the resume desk. Mechanical, but for the digest of a request and for
indices that can be none."""

from __future__ import annotations

import hashlib

from baton.errors import FieldViolation, invalid_request
from baton.v1 import generation_pb2 as pb
from router.resuming.resume_desk import Continuation
from router.service_messages import request_from_proto


def request_digest(message: pb.GenerateRequest) -> str:
    """SHA-256, hexadecimal, of the message as this library writes it: the same for the same content, whatever order
    and language it was sent in."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()


def next_indices_of(message: pb.ResumeGenerateRequest) -> tuple[int, ...]:
    """Of each sample. Raises INVALID_REQUEST for what cannot be an index, or is said in both ways."""
    violations = [
        FieldViolation(field, f"is {index}; must be 0 or more, the index of the first token that you lack")
        for field, index in (
            ("next_token_index", message.next_token_index),
            *((f"next_token_indices[{place}]", each) for place, each in enumerate(message.next_token_indices)),
        )
        if index < 0
    ]
    if message.next_token_index and message.next_token_indices:
        said = f"is {message.next_token_index} beside next_token_indices; leave it out, or they"
        violations.append(FieldViolation("next_token_index", said))
    if violations:
        raise invalid_request(violations)
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
