from baton.v1 import common_pb2 as _common_pb2
from baton.v1 import fleet_pb2 as _fleet_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
    FINISH_REASON_HANDED_OFF: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason
FINISH_REASON_HANDED_OFF: FinishReason

class FetchPart(_message.Message):
    __slots__ = ("source", "first_block", "num_blocks", "tier")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    source: _common_pb2.Peer
    first_block: int
    num_blocks: int
    tier: _common_pb2.Tier
    def __init__(self, source: _Optional[_Union[_common_pb2.Peer, _Mapping]] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ...) -> None: ...

class StartPrefill(_message.Message):
    __slots__ = ("task", "fetch")
    TASK_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    task: _common_pb2.GenerationTask
    fetch: _containers.RepeatedCompositeFieldContainer[FetchPart]
    def __init__(self, task: _Optional[_Union[_common_pb2.GenerationTask, _Mapping]] = ..., fetch: _Optional[_Iterable[_Union[FetchPart, _Mapping]]] = ...) -> None: ...

class StartDecode(_message.Message):
    __slots__ = ("task", "prefill", "fetch")
    TASK_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    task: _common_pb2.GenerationTask
    prefill: _common_pb2.Peer
    fetch: _containers.RepeatedCompositeFieldContainer[FetchPart]
    def __init__(self, task: _Optional[_Union[_common_pb2.GenerationTask, _Mapping]] = ..., prefill: _Optional[_Union[_common_pb2.Peer, _Mapping]] = ..., fetch: _Optional[_Iterable[_Union[FetchPart, _Mapping]]] = ...) -> None: ...

class Adopt(_message.Message):
    __slots__ = ("attempt",)
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("attempt", "reason")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    reason: str
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Resync(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetRole(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: _fleet_pb2.Role
    def __init__(self, role: _Optional[_Union[_fleet_pb2.Role, str]] = ...) -> None: ...

class ConductorMessage(_message.Message):
    __slots__ = ("start_prefill", "start_decode", "cancel", "drain", "resync", "adopt", "set_role")
    START_PREFILL_FIELD_NUMBER: _ClassVar[int]
    START_DECODE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    RESYNC_FIELD_NUMBER: _ClassVar[int]
    ADOPT_FIELD_NUMBER: _ClassVar[int]
    SET_ROLE_FIELD_NUMBER: _ClassVar[int]
    start_prefill: StartPrefill
    start_decode: StartDecode
    cancel: Cancel
    drain: Drain
    resync: Resync
    adopt: Adopt
    set_role: SetRole
    def __init__(self, start_prefill: _Optional[_Union[StartPrefill, _Mapping]] = ..., start_decode: _Optional[_Union[StartDecode, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., resync: _Optional[_Union[Resync, _Mapping]] = ..., adopt: _Optional[_Union[Adopt, _Mapping]] = ..., set_role: _Optional[_Union[SetRole, _Mapping]] = ...) -> None: ...

class SpanCount(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: int
    def __init__(self, name: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("name", "start_s", "end_s", "counts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    start_s: float
    end_s: float
    counts: _containers.RepeatedCompositeFieldContainer[SpanCount]
    def __init__(self, name: _Optional[str] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., counts: _Optional[_Iterable[_Union[SpanCount, _Mapping]]] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("reason", "error", "cached_tokens", "spans")
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    error: _common_pb2.WireError
    cached_tokens: int
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., error: _Optional[_Union[_common_pb2.WireError, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class AttemptOutput(_message.Message):
    __slots__ = ("attempt", "tokens", "finish")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.SampledToken]
    finish: Finish
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ..., tokens: _Optional[_Iterable[_Union[_common_pb2.SampledToken, _Mapping]]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ...) -> None: ...

class StepReport(_message.Message):
    __slots__ = ("outputs", "load", "named", "numbers", "token_ids", "indices")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    NAMED_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[AttemptOutput]
    load: _common_pb2.WorkerLoad
    named: _containers.RepeatedCompositeFieldContainer[_common_pb2.AttemptId]
    numbers: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, outputs: _Optional[_Iterable[_Union[AttemptOutput, _Mapping]]] = ..., load: _Optional[_Union[_common_pb2.WorkerLoad, _Mapping]] = ..., named: _Optional[_Iterable[_Union[_common_pb2.AttemptId, _Mapping]]] = ..., numbers: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...

class KvEvents(_message.Message):
    __slots__ = ("number", "tier", "added", "removed")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    number: int
    tier: _common_pb2.Tier
    added: bytes
    removed: bytes
    def __init__(self, number: _Optional[int] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., added: _Optional[bytes] = ..., removed: _Optional[bytes] = ...) -> None: ...

class KvSnapshot(_message.Message):
    __slots__ = ("number", "tier", "keys", "first", "last")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    number: int
    tier: _common_pb2.Tier
    keys: bytes
    first: bool
    last: bool
    def __init__(self, number: _Optional[int] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., keys: _Optional[bytes] = ..., first: _Optional[bool] = ..., last: _Optional[bool] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("step_report", "kv_events", "kv_snapshot")
    STEP_REPORT_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    KV_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    step_report: StepReport
    kv_events: KvEvents
    kv_snapshot: KvSnapshot
    def __init__(self, step_report: _Optional[_Union[StepReport, _Mapping]] = ..., kv_events: _Optional[_Union[KvEvents, _Mapping]] = ..., kv_snapshot: _Optional[_Union[KvSnapshot, _Mapping]] = ...) -> None: ...
