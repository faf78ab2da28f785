from baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BlocksHello(_message.Message):
    __slots__ = ("name", "incarnation", "layout", "transport", "endpoint", "lease_ttl_s", "expected_incarnation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    layout: _common_pb2.KvLayout
    transport: str
    endpoint: bytes
    lease_ttl_s: float
    expected_incarnation: str
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., transport: _Optional[str] = ..., endpoint: _Optional[bytes] = ..., lease_ttl_s: _Optional[float] = ..., expected_incarnation: _Optional[str] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("number", "keys")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    number: int
    keys: bytes
    def __init__(self, number: _Optional[int] = ..., keys: _Optional[bytes] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("number", "keys", "blocks", "depth", "digests", "pin_s", "parent")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    PIN_S_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    number: int
    keys: bytes
    blocks: _containers.RepeatedScalarFieldContainer[int]
    depth: int
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    pin_s: float
    parent: bytes
    def __init__(self, number: _Optional[int] = ..., keys: _Optional[bytes] = ..., blocks: _Optional[_Iterable[int]] = ..., depth: _Optional[int] = ..., digests: _Optional[_Iterable[bytes]] = ..., pin_s: _Optional[float] = ..., parent: _Optional[bytes] = ...) -> None: ...

class Lend(_message.Message):
    __slots__ = ("number", "first", "blocks", "digests")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    number: int
    first: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, number: _Optional[int] = ..., first: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LendEnd(_message.Message):
    __slots__ = ("number", "count")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    number: int
    count: int
    def __init__(self, number: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class RenewLoans(_message.Message):
    __slots__ = ("numbers",)
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    numbers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, numbers: _Optional[_Iterable[int]] = ...) -> None: ...

class Return(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Returned(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class LoanExpired(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class BlocksRefused(_message.Message):
    __slots__ = ("number", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    error: _common_pb2.WireError
    def __init__(self, number: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.WireError, _Mapping]] = ...) -> None: ...

class BlocksMessage(_message.Message):
    __slots__ = ("hello", "ask", "offer", "lend", "lend_end", "renew", "give_back", "returned", "expired", "refused")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    LEND_FIELD_NUMBER: _ClassVar[int]
    LEND_END_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    GIVE_BACK_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    hello: BlocksHello
    ask: Ask
    offer: Offer
    lend: Lend
    lend_end: LendEnd
    renew: RenewLoans
    give_back: Return
    returned: Returned
    expired: LoanExpired
    refused: BlocksRefused
    def __init__(self, hello: _Optional[_Union[BlocksHello, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., lend: _Optional[_Union[Lend, _Mapping]] = ..., lend_end: _Optional[_Union[LendEnd, _Mapping]] = ..., renew: _Optional[_Union[RenewLoans, _Mapping]] = ..., give_back: _Optional[_Union[Return, _Mapping]] = ..., returned: _Optional[_Union[Returned, _Mapping]] = ..., expired: _Optional[_Union[LoanExpired, _Mapping]] = ..., refused: _Optional[_Union[BlocksRefused, _Mapping]] = ...) -> None: ...
