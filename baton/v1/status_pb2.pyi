import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]

class WorkerHealth(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_HEALTH_UNSPECIFIED: _ClassVar[WorkerHealth]
    WORKER_HEALTH_READY: _ClassVar[WorkerHealth]
    WORKER_HEALTH_CONNECTING: _ClassVar[WorkerHealth]
    WORKER_HEALTH_SUSPECT: _ClassVar[WorkerHealth]
    WORKER_HEALTH_DRAINING: _ClassVar[WorkerHealth]
    WORKER_HEALTH_LOST: _ClassVar[WorkerHealth]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole
WORKER_HEALTH_UNSPECIFIED: WorkerHealth
WORKER_HEALTH_READY: WorkerHealth
WORKER_HEALTH_CONNECTING: WorkerHealth
WORKER_HEALTH_SUSPECT: WorkerHealth
WORKER_HEALTH_DRAINING: WorkerHealth
WORKER_HEALTH_LOST: WorkerHealth

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval",)
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    interval: _duration_pb2.Duration
    def __init__(self, interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WatchStatusResponse(_message.Message):
    __slots__ = ("is_serving", "in_flight_count", "queued_count", "finished_count", "failed_count", "workers", "phases")
    IS_SERVING_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_COUNT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_COUNT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_COUNT_FIELD_NUMBER: _ClassVar[int]
    FAILED_COUNT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    is_serving: bool
    in_flight_count: int
    queued_count: int
    finished_count: int
    failed_count: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    phases: _containers.RepeatedCompositeFieldContainer[PhaseStatistics]
    def __init__(self, is_serving: bool = ..., in_flight_count: _Optional[int] = ..., queued_count: _Optional[int] = ..., finished_count: _Optional[int] = ..., failed_count: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., phases: _Optional[_Iterable[_Union[PhaseStatistics, _Mapping]]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "role", "health", "assigned_count", "running_count", "waiting_count", "used_block_count", "block_count", "held_lease_count", "kv_bytes_per_s", "recomputed_share", "no_room_count", "quarantined_pull_count")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_COUNT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    WAITING_COUNT_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    HELD_LEASE_COUNT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_SHARE_FIELD_NUMBER: _ClassVar[int]
    NO_ROOM_COUNT_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_PULL_COUNT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: WorkerRole
    health: WorkerHealth
    assigned_count: int
    running_count: int
    waiting_count: int
    used_block_count: int
    block_count: int
    held_lease_count: int
    kv_bytes_per_s: float
    recomputed_share: float
    no_room_count: int
    quarantined_pull_count: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., health: _Optional[_Union[WorkerHealth, str]] = ..., assigned_count: _Optional[int] = ..., running_count: _Optional[int] = ..., waiting_count: _Optional[int] = ..., used_block_count: _Optional[int] = ..., block_count: _Optional[int] = ..., held_lease_count: _Optional[int] = ..., kv_bytes_per_s: _Optional[float] = ..., recomputed_share: _Optional[float] = ..., no_room_count: _Optional[int] = ..., quarantined_pull_count: _Optional[int] = ...) -> None: ...

class PhaseStatistics(_message.Message):
    __slots__ = ("name", "sample_count", "p50", "p95")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    P50_FIELD_NUMBER: _ClassVar[int]
    P95_FIELD_NUMBER: _ClassVar[int]
    name: str
    sample_count: int
    p50: _duration_pb2.Duration
    p95: _duration_pb2.Duration
    def __init__(self, name: _Optional[str] = ..., sample_count: _Optional[int] = ..., p50: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., p95: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
