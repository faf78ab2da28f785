"""Protobuf messages that nobody should send: any message of a type, and changes of good ones.

Values are odd on purpose: the ends of every range, NaN, unknown enum numbers, unset oneofs, empty
and very long strings. What the good messages have is drawn from as well, so that a message may
speak of the wrong attempt or loan, and not only of one that nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

Msg = TypeVar("Msg", bound=Message)
Draw = Any

_DOUBLES = [
    0.0,
    -0.0,
    -1.0,
    0.5,
    1e-300,
    1e-9,
    1e9,
    1e300,
    float("inf"),
    float("-inf"),
    float("nan"),
]
_TEXTS = ["", "a", "\0", "é\u202e", "x" * 3000, "../../etc/passwd", "127.0.0.1:1", "[::1", "%s{}"]
_BYTES = [b"", b"\xff", bytes(15), bytes(16), bytes(17), b"\xff" * 16, bytes(32), b"k" * 4096]
_MANY = 2000  # items of a list that is very long
_DEEP = 4


def _whole(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    edges = [low, high, high - 1, 0, 1, 2**31 - 1]
    return st.sampled_from(edges) | st.integers(0, 20) | st.integers(low, high)


_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_UINT32: _whole(32, False),
    FieldDescriptor.TYPE_UINT64: _whole(64, False),
    FieldDescriptor.TYPE_INT32: _whole(32, True),
    FieldDescriptor.TYPE_SINT32: _whole(32, True),
    FieldDescriptor.TYPE_INT64: _whole(64, True),
    FieldDescriptor.TYPE_ENUM: st.integers(0, 6) | st.sampled_from([-1, 77, 2**31 - 1]),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_DOUBLE: st.sampled_from(_DOUBLES) | st.floats(),
}


class Odd:
    """Messages of type `cls`. `good` are messages that make sense; their texts are used again."""

    def __init__(self, good: Sequence[Msg], skip: Sequence[str] = ()) -> None:
        """`skip` names kinds of the oneof that are never sent."""
        self._good = list(good)
        self._cls = type(self._good[0])
        self._skip = skip
        texts, raws = set(_TEXTS), set(_BYTES)
        for message in self._good:
            _collect(message, texts, raws)
        self._texts = st.sampled_from(sorted(texts)) | st.text(max_size=20)
        self._bytes = st.sampled_from(sorted(raws)) | st.binary(max_size=40)

    def messages(self) -> st.SearchStrategy[bytes]:
        """Serialized: nearly good ones, odd ones, damaged ones, and good ones."""
        good = st.sampled_from(self._good)
        changed = st.builds(self._bytes_of, self._changed())
        return good.map(_dump) | changed | changed | self._odd().map(_dump) | self._damaged()

    def typed(self) -> st.SearchStrategy[Any]:
        """Messages that a peer of this version could send, as messages."""
        return st.sampled_from(self._good) | self._changed() | self._changed() | self._odd()

    def _bytes_of(self, message: Message) -> bytes:
        return _dump(message)

    def _odd(self) -> st.SearchStrategy[Any]:
        @st.composite
        def build(draw: Draw) -> Message:
            message = self._cls()
            self._fill(draw, message, 0)
            return message

        return build().filter(self._allowed)

    def _changed(self) -> st.SearchStrategy[Any]:
        @st.composite
        def build(draw: Draw) -> Message:
            message = self._cls()
            message.CopyFrom(draw(st.sampled_from(self._good)))
            for _ in range(draw(st.integers(1, 3))):
                self._change(draw, message, 0)
            return message

        return build().filter(self._allowed)

    def _damaged(self) -> st.SearchStrategy[bytes]:
        """A good message with wrong bytes: mostly no protobuf, or one of unknown fields."""

        @st.composite
        def build(draw: Draw) -> bytes:
            raw = bytearray(_dump(draw(st.sampled_from(self._good))))
            for _ in range(draw(st.integers(1, 4))):
                at = draw(st.integers(0, max(0, len(raw) - 1)))
                how = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
                if how == "flip" and raw:
                    raw[at] ^= draw(st.integers(1, 255))
                elif how == "cut":
                    del raw[at:]
                elif how == "insert":
                    raw[at:at] = draw(st.binary(min_size=1, max_size=8))
                else:
                    raw += raw[at:]
            return bytes(raw) if self._allowed_raw(bytes(raw)) else b""

        return build()

    def _allowed(self, message: Message) -> bool:
        return not self._skip or message.WhichOneof("kind") not in self._skip

    def _allowed_raw(self, raw: bytes) -> bool:
        try:
            return self._allowed(self._cls.FromString(raw))
        except Exception:  # no protobuf: whatever it is, it is not one of those
            return True

    def _fill(self, draw: Draw, message: Message, depth: int) -> None:
        kind: Descriptor = message.DESCRIPTOR
        chosen = {one.name: draw(st.sampled_from(list(one.fields))).name for one in kind.oneofs}
        for field in kind.fields:
            one = field.containing_oneof
            if one is not None and chosen[one.name] != field.name:
                continue
            if draw(st.integers(0, 3)):
                self._set(draw, message, field, depth)

    def _change(self, draw: Draw, message: Message, depth: int) -> None:
        """One field of it, or of a message in it, becomes something else."""
        fields = list(message.DESCRIPTOR.fields)
        if not fields:
            return
        present = [field for field, _ in message.ListFields()]
        field = draw(st.sampled_from(present) if present and depth < 2 else st.sampled_from(fields))
        inner = _inner(draw, message, field)
        if inner is not None and draw(st.integers(0, 5)):
            self._change(draw, inner, depth + 1)
        elif draw(st.integers(0, 4)):
            self._set(draw, message, field, depth)
        else:
            message.ClearField(field.name)

    def _set(self, draw: Draw, message: Message, field: FieldDescriptor, depth: int) -> None:
        message.ClearField(field.name)
        if field.is_repeated:
            self._set_many(draw, message, field, depth)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            inner.SetInParent()
            if depth < _DEEP:
                self._fill(draw, inner, depth + 1)
        else:
            setattr(message, field.name, draw(self._scalar(field)))

    def _set_many(self, draw: Draw, message: Message, field: FieldDescriptor, depth: int) -> None:
        items = getattr(message, field.name)
        count = draw(st.sampled_from([0, 1, 2, 3]))
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            values = [draw(self._scalar(field)) for _ in range(count)]
            repeat = _MANY if draw(st.integers(0, 30)) == 0 else 1
            items.extend(values * repeat)
        elif field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            for _ in range(count):
                items[draw(self._scalar(key))] = draw(self._scalar(value))
        elif depth < _DEEP:
            for _ in range(count):
                self._fill(draw, items.add(), depth + 1)

    def _scalar(self, field: FieldDescriptor) -> st.SearchStrategy[Any]:
        if field.type == FieldDescriptor.TYPE_STRING:
            return self._texts
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self._bytes
        return _SCALARS[field.type]


def greeted(odd: Odd, hello: Message) -> st.SearchStrategy[list[bytes]]:
    """What is said on a stream, mostly after a greeting that is right, or nearly."""
    right, none = st.just([_dump(hello)]), st.just([])
    nearly = Odd([hello]).messages().map(lambda raw: [raw])
    said = st.lists(odd.messages(), max_size=10)
    return st.builds(lambda a, b: a + b, right | right | nearly | none, said)


def _inner(draw: Draw, message: Message, field: FieldDescriptor) -> Message | None:
    """A message in `field` that is there, if any."""
    if field.type != FieldDescriptor.TYPE_MESSAGE or field.message_type.GetOptions().map_entry:
        return None
    if field.is_repeated:
        items = getattr(message, field.name)
        return draw(st.sampled_from(list(items))) if items else None
    return getattr(message, field.name) if message.HasField(field.name) else None


def _collect(message: Message, texts: set[str], raws: set[bytes]) -> None:
    """The strings and bytes in it."""
    for field, value in message.ListFields():
        for item in value if field.is_repeated else [value]:
            if isinstance(item, Message):
                _collect(item, texts, raws)
            elif isinstance(item, str):
                texts.add(item)
            elif isinstance(item, bytes):
                raws.add(item)


def _dump(message: Message) -> bytes:
    return message.SerializeToString()
