from baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("worker", "incarnation", "layout", "transport", "endpoint", "lease_ttl_s", "expected_incarnation")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: str
    layout: _common_pb2.KvLayout
    transport: str
    endpoint: bytes
    lease_ttl_s: float
    expected_incarnation: str
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[str] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., transport: _Optional[str] = ..., endpoint: _Optional[bytes] = ..., lease_ttl_s: _Optional[float] = ..., expected_incarnation: _Optional[str] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("attempt", "trace")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    trace: _common_pb2.TraceContext
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ..., trace: _Optional[_Union[_common_pb2.TraceContext, _Mapping]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("attempts",)
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    attempts: _containers.RepeatedCompositeFieldContainer[_common_pb2.AttemptId]
    def __init__(self, attempts: _Optional[_Iterable[_Union[_common_pb2.AttemptId, _Mapping]]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("attempt", "digest")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    digest: bytes
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("attempt", "reason")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    reason: str
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class DecodeMessage(_message.Message):
    __slots__ = ("hello", "attach", "renew", "release", "abort")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    attach: Attach
    renew: Renew
    release: Release
    abort: Abort
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ...) -> None: ...

class Ranges(_message.Message):
    __slots__ = ("attempt", "first_block", "blocks", "layer_begin", "layer_end", "digests")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    first_block: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    layer_begin: int
    layer_end: int
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ..., first_block: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Prefilled(_message.Message):
    __slots__ = ("attempt", "first", "num_blocks", "cached_tokens")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    first: _common_pb2.SampledToken
    num_blocks: int
    cached_tokens: int
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ..., first: _Optional[_Union[_common_pb2.SampledToken, _Mapping]] = ..., num_blocks: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ("attempt",)
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ...) -> None: ...

class Expired(_message.Message):
    __slots__ = ("attempt",)
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("attempt", "error")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    attempt: _common_pb2.AttemptId
    error: _common_pb2.WireError
    def __init__(self, attempt: _Optional[_Union[_common_pb2.AttemptId, _Mapping]] = ..., error: _Optional[_Union[_common_pb2.WireError, _Mapping]] = ...) -> None: ...

class PrefillMessage(_message.Message):
    __slots__ = ("hello", "ranges", "prefilled", "released", "expired", "refused")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    ranges: Ranges
    prefilled: Prefilled
    released: Released
    expired: Expired
    refused: Refused
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., ranges: _Optional[_Union[Ranges, _Mapping]] = ..., prefilled: _Optional[_Union[Prefilled, _Mapping]] = ..., released: _Optional[_Union[Released, _Mapping]] = ..., expired: _Optional[_Union[Expired, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ...) -> None: ...
