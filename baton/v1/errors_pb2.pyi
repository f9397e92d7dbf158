from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_REQUEST: _ClassVar[ErrorReason]
    ERROR_REASON_PROMPT_TOO_LONG: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_QUEUE_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_NO_WORKER: _ClassVar[ErrorReason]
    ERROR_REASON_ATTEMPTS_EXHAUSTED: _ClassVar[ErrorReason]
    ERROR_REASON_DEADLINE_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_DRAINING: _ClassVar[ErrorReason]
    ERROR_REASON_TICKET_REFUSED: _ClassVar[ErrorReason]
    ERROR_REASON_ENGINE_FAILED: _ClassVar[ErrorReason]
    ERROR_REASON_UNAUTHENTICATED: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_NO_ROOM: _ClassVar[ErrorReason]
    ERROR_REASON_PERMISSION_DENIED: _ClassVar[ErrorReason]
    ERROR_REASON_RESUME_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_RESUME_DENIED: _ClassVar[ErrorReason]
    ERROR_REASON_RESUME_TOO_LATE: _ClassVar[ErrorReason]
    ERROR_REASON_ATTACHED_ELSEWHERE: _ClassVar[ErrorReason]
    ERROR_REASON_TOO_MANY_RESUMABLE: _ClassVar[ErrorReason]
    ERROR_REASON_STALLED: _ClassVar[ErrorReason]
    ERROR_REASON_READER_TOO_SLOW: _ClassVar[ErrorReason]
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_INVALID_REQUEST: ErrorReason
ERROR_REASON_PROMPT_TOO_LONG: ErrorReason
ERROR_REASON_MODEL_NOT_FOUND: ErrorReason
ERROR_REASON_QUEUE_FULL: ErrorReason
ERROR_REASON_NO_WORKER: ErrorReason
ERROR_REASON_ATTEMPTS_EXHAUSTED: ErrorReason
ERROR_REASON_DEADLINE_EXCEEDED: ErrorReason
ERROR_REASON_DRAINING: ErrorReason
ERROR_REASON_TICKET_REFUSED: ErrorReason
ERROR_REASON_ENGINE_FAILED: ErrorReason
ERROR_REASON_UNAUTHENTICATED: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_NO_ROOM: ErrorReason
ERROR_REASON_PERMISSION_DENIED: ErrorReason
ERROR_REASON_RESUME_UNKNOWN: ErrorReason
ERROR_REASON_RESUME_DENIED: ErrorReason
ERROR_REASON_RESUME_TOO_LATE: ErrorReason
ERROR_REASON_ATTACHED_ELSEWHERE: ErrorReason
ERROR_REASON_TOO_MANY_RESUMABLE: ErrorReason
ERROR_REASON_STALLED: ErrorReason
ERROR_REASON_READER_TOO_SLOW: ErrorReason
