"""Protobuf messages that nobody should send: any message of a type, and changes of good ones.

Values are odd on purpose: the ends of every range, NaN, unknown enum numbers, unset oneofs, empty
and very long strings. What the good messages have is drawn from as well, so that a message may
speak of the wrong attempt or loan, and not only of one that nobody knows.

A message is made by a random generator from one number, which hypothesis chooses: cheaper than
drawing every field, and a failing case still gets as few messages as possible.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_DOUBLES = [0.0, -0.0, -1.0, 0.5, 1e-300, 1e-9, 1e9, 1e300, float("inf"), -float("inf")]
_DOUBLES += [float("nan")] * 2
_TEXTS = ["", "a", "\0", "é\u202e", "x" * 3000, "../../etc/passwd", "127.0.0.1:1", "[::1", "%s{}"]
_BYTES = [b"", b"\xff", bytes(15), bytes(16), bytes(17), b"\xff" * 16, bytes(32), b"k" * 4096]
_ENUMS = [0, 1, 2, 3, 4, 5, 6, -1, 77, 2**31 - 1]
_RANGES = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
}
_MANY = 2000  # items of a list that is very long
_DEEP = 4


class Odd:
    """Messages of one type. `good` are messages of it that make sense; `skip` names kinds of its
    oneof that are never sent."""

    def __init__(self, good: Sequence[Message], skip: Sequence[str] = ()) -> None:
        self._good = list(good)
        self._skip = skip
        texts, raws = set(_TEXTS), set(_BYTES)
        for message in self._good:
            _collect(message, texts, raws)
        self._texts, self._raws = sorted(texts), sorted(raws)

    def messages(self) -> st.SearchStrategy[bytes]:
        """Serialized: good ones, nearly good ones, odd ones, and damaged ones."""
        return st.integers(0, 2**32 - 1).map(self._make)

    def _make(self, number: int) -> bytes:
        rng = random.Random(number)
        good, changed, odd, damaged = (
            self._a_good_one, self._a_changed_one, self._an_odd_one, self._a_damaged_one
        )  # fmt: skip
        raw = rng.choice([good, changed, changed, odd, damaged])(rng)
        return raw if self._is_allowed(raw) else self._good[0].SerializeToString()

    def _is_allowed(self, raw: bytes) -> bool:
        if not self._skip:
            return True
        try:
            return type(self._good[0]).FromString(raw).WhichOneof("kind") not in self._skip
        except Exception:  # no protobuf: whatever it is, it is not one of those
            return True

    def _a_good_one(self, rng: random.Random) -> bytes:
        return rng.choice(self._good).SerializeToString()

    def _an_odd_one(self, rng: random.Random) -> bytes:
        message = type(self._good[0])()
        self._fill(rng, message, 0)
        return message.SerializeToString()

    def _a_changed_one(self, rng: random.Random) -> bytes:
        message = type(self._good[0]).FromString(self._a_good_one(rng))
        for _ in range(rng.randint(1, 3)):
            self._change(rng, message, 0)
        return message.SerializeToString()

    def _a_damaged_one(self, rng: random.Random) -> bytes:
        """Wrong bytes: mostly no protobuf, or one of unknown fields."""
        raw = bytearray(self._a_good_one(rng))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw) + 1)
            match rng.choice(["flip", "cut", "insert", "repeat"]):
                case "flip" if at < len(raw):
                    raw[at] ^= rng.randint(1, 255)
                case "cut":
                    del raw[at:]
                case "insert":
                    raw[at:at] = rng.randbytes(rng.randint(1, 8))
                case _:
                    raw += raw[at:]
        return bytes(raw)

    def _fill(self, rng: random.Random, message: Message, depth: int) -> None:
        """Most of its fields, and one of each oneof."""
        kind = message.DESCRIPTOR
        chosen = {one.name: rng.choice(list(one.fields)).name for one in kind.oneofs}
        for field in kind.fields:
            one = field.containing_oneof
            if (one is None or chosen[one.name] == field.name) and rng.random() < 0.75:
                self._set(rng, message, field, depth)

    def _change(self, rng: random.Random, message: Message, depth: int) -> None:
        """One field of it, or of a message in it, becomes something else."""
        fields = list(message.DESCRIPTOR.fields)
        if not fields:
            return
        present = [field for field, _ in message.ListFields()]
        field = rng.choice(present if present and rng.random() < 0.8 else fields)
        inner = _inner(rng, message, field)
        if inner is not None and rng.random() < 0.85:
            self._change(rng, inner, depth + 1)
        elif rng.random() < 0.8:
            self._set(rng, message, field, depth)
        else:
            message.ClearField(field.name)

    def _set(
        self, rng: random.Random, message: Message, field: FieldDescriptor, depth: int
    ) -> None:
        message.ClearField(field.name)
        if field.is_repeated:
            self._set_many(rng, message, field, depth)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            inner.SetInParent()
            if depth < _DEEP:
                self._fill(rng, inner, depth + 1)
        else:
            setattr(message, field.name, self._scalar(rng, field))

    def _set_many(
        self, rng: random.Random, message: Message, field: FieldDescriptor, depth: int
    ) -> None:
        items, count = getattr(message, field.name), rng.randint(0, 3)
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            values = [self._scalar(rng, field) for _ in range(count)]
            items.extend(values * (_MANY if rng.random() < 0.03 else 1))
        elif field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            for _ in range(count):
                items[self._scalar(rng, key)] = self._scalar(rng, value)
        elif depth < _DEEP:
            for _ in range(count):
                self._fill(rng, items.add(), depth + 1)

    def _scalar(self, rng: random.Random, field: FieldDescriptor) -> Any:
        match field.type:
            case FieldDescriptor.TYPE_STRING:
                return rng.choice(self._texts)
            case FieldDescriptor.TYPE_BYTES:
                return rng.choice([*self._raws, rng.randbytes(rng.randint(0, 40))])
            case FieldDescriptor.TYPE_DOUBLE:
                return rng.choice([*_DOUBLES, rng.uniform(-3, 120)])
            case FieldDescriptor.TYPE_BOOL:
                return rng.random() < 0.5
            case FieldDescriptor.TYPE_ENUM:
                return rng.choice(_ENUMS)
        low, high = _RANGES[field.type]
        edges = [low, high, high - 1, 0, 1, 2**31 - 1]
        return rng.choice([rng.choice(edges), rng.randint(0, 20), rng.randint(low, high)])


def greeted(odd: Odd, hello: Message) -> st.SearchStrategy[list[bytes]]:
    """What is said on a stream, mostly after a greeting that is right, or nearly."""
    right: st.SearchStrategy[list[bytes]] = st.just([hello.SerializeToString()])
    nearly = Odd([hello]).messages().map(lambda raw: [raw])
    none: st.SearchStrategy[list[bytes]] = st.just([])
    said = st.lists(odd.messages(), max_size=10)
    return st.builds(lambda a, b: a + b, st.one_of(right, right, nearly, none), said)


def _inner(rng: random.Random, message: Message, field: FieldDescriptor) -> Message | None:
    """A message in `field` that is there, if any."""
    if field.type != FieldDescriptor.TYPE_MESSAGE or field.message_type.GetOptions().map_entry:
        return None
    if field.is_repeated:
        items = getattr(message, field.name)
        return rng.choice(list(items)) if items else None
    return getattr(message, field.name) if message.HasField(field.name) else None


def _collect(message: Message, texts: set[str], raws: set[bytes]) -> None:
    """The strings and bytes in it."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
            continue
        for item in value if field.is_repeated else [value]:
            if isinstance(item, Message):
                _collect(item, texts, raws)
            elif isinstance(item, str):
                texts.add(item)
            elif isinstance(item, bytes):
                raws.add(item)
