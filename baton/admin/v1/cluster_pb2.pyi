from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchClusterRequest(_message.Message):
    __slots__ = ("interval_ms",)
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    def __init__(self, interval_ms: _Optional[int] = ...) -> None: ...

class WatchClusterResponse(_message.Message):
    __slots__ = ("workers", "queued_count", "in_flight_count", "phases", "finished_count", "failed_count", "is_serving")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_COUNT_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_COUNT_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_COUNT_FIELD_NUMBER: _ClassVar[int]
    FAILED_COUNT_FIELD_NUMBER: _ClassVar[int]
    IS_SERVING_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerState]
    queued_count: int
    in_flight_count: int
    phases: _containers.RepeatedCompositeFieldContainer[PhaseStats]
    finished_count: int
    failed_count: int
    is_serving: bool
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerState, _Mapping]]] = ..., queued_count: _Optional[int] = ..., in_flight_count: _Optional[int] = ..., phases: _Optional[_Iterable[_Union[PhaseStats, _Mapping]]] = ..., finished_count: _Optional[int] = ..., failed_count: _Optional[int] = ..., is_serving: bool = ...) -> None: ...

class WorkerState(_message.Message):
    __slots__ = ("worker_id", "role", "address", "health", "assigned_count", "running_count", "waiting_count", "used_block_count", "block_count", "held_lease_count", "epoch", "kv_bytes_per_s", "recomputed_share", "no_room_count")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_COUNT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    WAITING_COUNT_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    HELD_LEASE_COUNT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_SHARE_FIELD_NUMBER: _ClassVar[int]
    NO_ROOM_COUNT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    address: str
    health: str
    assigned_count: int
    running_count: int
    waiting_count: int
    used_block_count: int
    block_count: int
    held_lease_count: int
    epoch: str
    kv_bytes_per_s: float
    recomputed_share: float
    no_room_count: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., health: _Optional[str] = ..., assigned_count: _Optional[int] = ..., running_count: _Optional[int] = ..., waiting_count: _Optional[int] = ..., used_block_count: _Optional[int] = ..., block_count: _Optional[int] = ..., held_lease_count: _Optional[int] = ..., epoch: _Optional[str] = ..., kv_bytes_per_s: _Optional[float] = ..., recomputed_share: _Optional[float] = ..., no_room_count: _Optional[int] = ...) -> None: ...

class PhaseStats(_message.Message):
    __slots__ = ("name", "sample_count", "p50_ms", "p95_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    P50_MS_FIELD_NUMBER: _ClassVar[int]
    P95_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    sample_count: int
    p50_ms: float
    p95_ms: float
    def __init__(self, name: _Optional[str] = ..., sample_count: _Optional[int] = ..., p50_ms: _Optional[float] = ..., p95_ms: _Optional[float] = ...) -> None: ...

class WorkerSpec(_message.Message):
    __slots__ = ("worker_id", "address", "role", "epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    role: str
    epoch: str
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., role: _Optional[str] = ..., epoch: _Optional[str] = ...) -> None: ...

class SetWorkersRequest(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerSpec]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerSpec, _Mapping]]] = ...) -> None: ...

class SetWorkersResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("assigned_count",)
    ASSIGNED_COUNT_FIELD_NUMBER: _ClassVar[int]
    assigned_count: int
    def __init__(self, assigned_count: _Optional[int] = ...) -> None: ...

class SetWorkerRoleRequest(_message.Message):
    __slots__ = ("worker_id", "role")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ...) -> None: ...

class SetWorkerRoleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
