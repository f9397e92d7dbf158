from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StructureKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STRUCTURE_KIND_UNSPECIFIED: _ClassVar[StructureKind]
    STRUCTURE_KIND_JSON_SCHEMA: _ClassVar[StructureKind]
    STRUCTURE_KIND_JSON_OBJECT: _ClassVar[StructureKind]
    STRUCTURE_KIND_REGEX: _ClassVar[StructureKind]
    STRUCTURE_KIND_CHOICE: _ClassVar[StructureKind]
    STRUCTURE_KIND_GRAMMAR: _ClassVar[StructureKind]

class LegFinish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEG_FINISH_UNSPECIFIED: _ClassVar[LegFinish]
    LEG_FINISH_STOP: _ClassVar[LegFinish]
    LEG_FINISH_LENGTH: _ClassVar[LegFinish]

class RecomputeReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECOMPUTE_REASON_UNSPECIFIED: _ClassVar[RecomputeReason]
    RECOMPUTE_REASON_FAILED: _ClassVar[RecomputeReason]
    RECOMPUTE_REASON_TIMED_OUT: _ClassVar[RecomputeReason]
    RECOMPUTE_REASON_EXPIRED: _ClassVar[RecomputeReason]
    RECOMPUTE_REASON_STALE: _ClassVar[RecomputeReason]
    RECOMPUTE_REASON_CORRUPT: _ClassVar[RecomputeReason]
STRUCTURE_KIND_UNSPECIFIED: StructureKind
STRUCTURE_KIND_JSON_SCHEMA: StructureKind
STRUCTURE_KIND_JSON_OBJECT: StructureKind
STRUCTURE_KIND_REGEX: StructureKind
STRUCTURE_KIND_CHOICE: StructureKind
STRUCTURE_KIND_GRAMMAR: StructureKind
LEG_FINISH_UNSPECIFIED: LegFinish
LEG_FINISH_STOP: LegFinish
LEG_FINISH_LENGTH: LegFinish
RECOMPUTE_REASON_UNSPECIFIED: RecomputeReason
RECOMPUTE_REASON_FAILED: RecomputeReason
RECOMPUTE_REASON_TIMED_OUT: RecomputeReason
RECOMPUTE_REASON_EXPIRED: RecomputeReason
RECOMPUTE_REASON_STALE: RecomputeReason
RECOMPUTE_REASON_CORRUPT: RecomputeReason

class SamplingSpec(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_token_sequences", "structure")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_TOKEN_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    STRUCTURE_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[TokenBias]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_token_sequences: _containers.RepeatedCompositeFieldContainer[TokenSequence]
    structure: StructureSpec
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[TokenBias, _Mapping]]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_token_sequences: _Optional[_Iterable[_Union[TokenSequence, _Mapping]]] = ..., structure: _Optional[_Union[StructureSpec, _Mapping]] = ...) -> None: ...

class TokenBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class TokenSequence(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class StructureSpec(_message.Message):
    __slots__ = ("kind", "text", "choices")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    kind: StructureKind
    text: str
    choices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, kind: _Optional[_Union[StructureKind, str]] = ..., text: _Optional[str] = ..., choices: _Optional[_Iterable[str]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class DrawnLogprobs(_message.Message):
    __slots__ = ("logprob", "rank", "top")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class StopSpec(_message.Message):
    __slots__ = ("max_token_count", "stop_token_ids", "ignore_eos", "min_token_count")
    MAX_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    max_token_count: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    min_token_count: int
    def __init__(self, max_token_count: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., min_token_count: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("leg_id", "prompt_token_ids", "sampling", "stop", "lease_s", "priority", "output_token_count", "top_logprob_count", "tenant")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROB_COUNT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    prompt_token_ids: bytes
    sampling: SamplingSpec
    stop: StopSpec
    lease_s: float
    priority: int
    output_token_count: int
    top_logprob_count: int
    tenant: str
    def __init__(self, leg_id: _Optional[str] = ..., prompt_token_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[SamplingSpec, _Mapping]] = ..., stop: _Optional[_Union[StopSpec, _Mapping]] = ..., lease_s: _Optional[float] = ..., priority: _Optional[int] = ..., output_token_count: _Optional[int] = ..., top_logprob_count: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("first_token_id", "finish", "ticket", "ticket_id", "queue_s", "compute_s", "cached_token_count", "kv_byte_count", "first_logprobs")
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    first_token_id: int
    finish: LegFinish
    ticket: bytes
    ticket_id: str
    queue_s: float
    compute_s: float
    cached_token_count: int
    kv_byte_count: int
    first_logprobs: DrawnLogprobs
    def __init__(self, first_token_id: _Optional[int] = ..., finish: _Optional[_Union[LegFinish, str]] = ..., ticket: _Optional[bytes] = ..., ticket_id: _Optional[str] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., cached_token_count: _Optional[int] = ..., kv_byte_count: _Optional[int] = ..., first_logprobs: _Optional[_Union[DrawnLogprobs, _Mapping]] = ...) -> None: ...

class PrefillScoredRequest(_message.Message):
    __slots__ = ("prefill", "prompt_logprob_count")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROB_COUNT_FIELD_NUMBER: _ClassVar[int]
    prefill: PrefillRequest
    prompt_logprob_count: int
    def __init__(self, prefill: _Optional[_Union[PrefillRequest, _Mapping]] = ..., prompt_logprob_count: _Optional[int] = ...) -> None: ...

class PrefillScoredResponse(_message.Message):
    __slots__ = ("part", "prefilled")
    PART_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    part: PromptScores
    prefilled: PrefillResponse
    def __init__(self, part: _Optional[_Union[PromptScores, _Mapping]] = ..., prefilled: _Optional[_Union[PrefillResponse, _Mapping]] = ...) -> None: ...

class PromptScores(_message.Message):
    __slots__ = ("logprobs", "ranks", "top_token_ids", "top_logprobs")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprobs: _Optional[_Iterable[float]] = ..., ranks: _Optional[_Iterable[int]] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class ReleaseKvRequest(_message.Message):
    __slots__ = ("ticket_id",)
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    def __init__(self, ticket_id: _Optional[str] = ...) -> None: ...

class ReleaseKvResponse(_message.Message):
    __slots__ = ("was_held",)
    WAS_HELD_FIELD_NUMBER: _ClassVar[int]
    was_held: bool
    def __init__(self, was_held: bool = ...) -> None: ...

class ExtendLeaseRequest(_message.Message):
    __slots__ = ("ticket_id", "lease_s")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    lease_s: float
    def __init__(self, ticket_id: _Optional[str] = ..., lease_s: _Optional[float] = ...) -> None: ...

class ExtendLeaseResponse(_message.Message):
    __slots__ = ("is_held",)
    IS_HELD_FIELD_NUMBER: _ClassVar[int]
    is_held: bool
    def __init__(self, is_held: bool = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("leg_id", "prompt_token_ids", "sampling", "stop", "ticket", "priority", "output_token_count", "top_logprob_count", "tenant")
    LEG_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROB_COUNT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    leg_id: str
    prompt_token_ids: bytes
    sampling: SamplingSpec
    stop: StopSpec
    ticket: bytes
    priority: int
    output_token_count: int
    top_logprob_count: int
    tenant: str
    def __init__(self, leg_id: _Optional[str] = ..., prompt_token_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[SamplingSpec, _Mapping]] = ..., stop: _Optional[_Union[StopSpec, _Mapping]] = ..., ticket: _Optional[bytes] = ..., priority: _Optional[int] = ..., output_token_count: _Optional[int] = ..., top_logprob_count: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("adopted", "step", "finished")
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    adopted: Adopted
    step: Step
    finished: DecodeFinished
    def __init__(self, adopted: _Optional[_Union[Adopted, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., finished: _Optional[_Union[DecodeFinished, _Mapping]] = ...) -> None: ...

class DecodeManyRequest(_message.Message):
    __slots__ = ("starts", "cancelled_leg_numbers", "taken_response_count")
    STARTS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_LEG_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    TAKEN_RESPONSE_COUNT_FIELD_NUMBER: _ClassVar[int]
    starts: _containers.RepeatedCompositeFieldContainer[LegStart]
    cancelled_leg_numbers: _containers.RepeatedScalarFieldContainer[int]
    taken_response_count: int
    def __init__(self, starts: _Optional[_Iterable[_Union[LegStart, _Mapping]]] = ..., cancelled_leg_numbers: _Optional[_Iterable[int]] = ..., taken_response_count: _Optional[int] = ...) -> None: ...

class LegStart(_message.Message):
    __slots__ = ("leg_number", "order", "timeout_s")
    LEG_NUMBER_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    leg_number: int
    order: DecodeRequest
    timeout_s: float
    def __init__(self, leg_number: _Optional[int] = ..., order: _Optional[_Union[DecodeRequest, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class DecodeManyResponse(_message.Message):
    __slots__ = ("leg_numbers", "token_counts", "token_ids", "news")
    LEG_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NEWS_FIELD_NUMBER: _ClassVar[int]
    leg_numbers: _containers.RepeatedScalarFieldContainer[int]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    news: _containers.RepeatedCompositeFieldContainer[LegNews]
    def __init__(self, leg_numbers: _Optional[_Iterable[int]] = ..., token_counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., news: _Optional[_Iterable[_Union[LegNews, _Mapping]]] = ...) -> None: ...

class LegNews(_message.Message):
    __slots__ = ("leg_number", "events", "failure")
    LEG_NUMBER_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    leg_number: int
    events: DecodeResponse
    failure: bytes
    def __init__(self, leg_number: _Optional[int] = ..., events: _Optional[_Union[DecodeResponse, _Mapping]] = ..., failure: _Optional[bytes] = ...) -> None: ...

class Adopted(_message.Message):
    __slots__ = ("wait_s", "transfer_s", "decode_wait_s", "transfer_byte_count", "descriptor_count", "recomputed_token_count", "prefill_s", "cached_token_count", "first_step_s", "recompute_reason", "pull_count", "post_s", "wire_s", "verify_s")
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_S_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_REASON_FIELD_NUMBER: _ClassVar[int]
    PULL_COUNT_FIELD_NUMBER: _ClassVar[int]
    POST_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_S_FIELD_NUMBER: _ClassVar[int]
    VERIFY_S_FIELD_NUMBER: _ClassVar[int]
    wait_s: float
    transfer_s: float
    decode_wait_s: float
    transfer_byte_count: int
    descriptor_count: int
    recomputed_token_count: int
    prefill_s: float
    cached_token_count: int
    first_step_s: float
    recompute_reason: RecomputeReason
    pull_count: int
    post_s: float
    wire_s: float
    verify_s: float
    def __init__(self, wait_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., decode_wait_s: _Optional[float] = ..., transfer_byte_count: _Optional[int] = ..., descriptor_count: _Optional[int] = ..., recomputed_token_count: _Optional[int] = ..., prefill_s: _Optional[float] = ..., cached_token_count: _Optional[int] = ..., first_step_s: _Optional[float] = ..., recompute_reason: _Optional[_Union[RecomputeReason, str]] = ..., pull_count: _Optional[int] = ..., post_s: _Optional[float] = ..., wire_s: _Optional[float] = ..., verify_s: _Optional[float] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("token_ids", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[DrawnLogprobs]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[DrawnLogprobs, _Mapping]]] = ...) -> None: ...

class DecodeFinished(_message.Message):
    __slots__ = ("finish",)
    FINISH_FIELD_NUMBER: _ClassVar[int]
    finish: LegFinish
    def __init__(self, finish: _Optional[_Union[LegFinish, str]] = ...) -> None: ...

class GetWorkerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWorkerInfoResponse(_message.Message):
    __slots__ = ("worker_id", "epoch", "role", "model", "max_context_token_count", "block_token_count", "block_count", "max_running_count", "kv_bytes_per_token", "engine", "vocab_size", "transfer_peer")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_PEER_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: str
    role: str
    model: str
    max_context_token_count: int
    block_token_count: int
    block_count: int
    max_running_count: int
    kv_bytes_per_token: int
    engine: str
    vocab_size: int
    transfer_peer: bytes
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[str] = ..., role: _Optional[str] = ..., model: _Optional[str] = ..., max_context_token_count: _Optional[int] = ..., block_token_count: _Optional[int] = ..., block_count: _Optional[int] = ..., max_running_count: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., engine: _Optional[str] = ..., vocab_size: _Optional[int] = ..., transfer_peer: _Optional[bytes] = ...) -> None: ...

class WatchLoadRequest(_message.Message):
    __slots__ = ("interval_ms",)
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    def __init__(self, interval_ms: _Optional[int] = ...) -> None: ...

class WatchLoadResponse(_message.Message):
    __slots__ = ("epoch", "running_count", "waiting_count", "used_block_count", "block_count", "held_lease_count", "is_draining", "quarantined_pull_count", "reserved_block_count", "no_room_count")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    WAITING_COUNT_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    HELD_LEASE_COUNT_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_PULL_COUNT_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    NO_ROOM_COUNT_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    running_count: int
    waiting_count: int
    used_block_count: int
    block_count: int
    held_lease_count: int
    is_draining: bool
    quarantined_pull_count: int
    reserved_block_count: int
    no_room_count: int
    def __init__(self, epoch: _Optional[str] = ..., running_count: _Optional[int] = ..., waiting_count: _Optional[int] = ..., used_block_count: _Optional[int] = ..., block_count: _Optional[int] = ..., held_lease_count: _Optional[int] = ..., is_draining: bool = ..., quarantined_pull_count: _Optional[int] = ..., reserved_block_count: _Optional[int] = ..., no_room_count: _Optional[int] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("load", "task_counts")
    class TaskCountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    LOAD_FIELD_NUMBER: _ClassVar[int]
    TASK_COUNTS_FIELD_NUMBER: _ClassVar[int]
    load: WatchLoadResponse
    task_counts: _containers.ScalarMap[str, int]
    def __init__(self, load: _Optional[_Union[WatchLoadResponse, _Mapping]] = ..., task_counts: _Optional[_Mapping[str, int]] = ...) -> None: ...

class IntroduceRequest(_message.Message):
    __slots__ = ("transfer_peers",)
    TRANSFER_PEERS_FIELD_NUMBER: _ClassVar[int]
    transfer_peers: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, transfer_peers: _Optional[_Iterable[bytes]] = ...) -> None: ...

class IntroduceResponse(_message.Message):
    __slots__ = ("introduced",)
    INTRODUCED_FIELD_NUMBER: _ClassVar[int]
    introduced: _containers.RepeatedCompositeFieldContainer[Introduced]
    def __init__(self, introduced: _Optional[_Iterable[_Union[Introduced, _Mapping]]] = ...) -> None: ...

class Introduced(_message.Message):
    __slots__ = ("worker_id", "epoch", "problem", "duration_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: str
    problem: str
    duration_s: float
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[str] = ..., problem: _Optional[str] = ..., duration_s: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("remaining_count",)
    REMAINING_COUNT_FIELD_NUMBER: _ClassVar[int]
    remaining_count: int
    def __init__(self, remaining_count: _Optional[int] = ...) -> None: ...
