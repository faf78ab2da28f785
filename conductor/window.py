"""What came of requests in the last minutes: counts, sums and quantiles in slots of a few seconds.

Memory is bounded whatever the load: a ring of slots, each with counts and two sketches.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeVar

SLOT_S = 5.0
SLOTS = 60  # whole ones; the one that is being filled comes on top
MAX_FLOWS = 256  # pairs of a slot; more are not told apart
_GROWTH = 1.05
_LOG_GROWTH = math.log(_GROWTH)
_LEAST, _MOST = 1e-6, 1e6  # what is outside counts as these

Key = TypeVar("Key")


class Sketch:
    """Counts of values in buckets that grow by 5 %: quantiles are right to 2.5 % (DDSketch, VLDB
    2019, without its collapsing: the range is bounded instead)."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def __len__(self) -> int:
        return sum(self._counts.values())

    def add(self, value: float) -> None:
        self._counts[math.ceil(math.log(min(max(value, _LEAST), _MOST)) / _LOG_GROWTH)] += 1

    def quantiles(self, shares: Iterable[float]) -> list[float]:
        """Of each of the shares, ascending, by nearest rank: of few values, p99 is the largest.
        Nothing when there are none."""
        buckets = sorted(self._counts.items())
        if not buckets:
            return []
        total = len(self)
        found: list[float] = []
        seen, at = buckets[0][1], 0
        for share in shares:
            while seen < math.ceil(share * total):
                at += 1
                seen += buckets[at][1]
            found.append(_value_of(buckets[at][0]))
        return found

    @classmethod
    def merged(cls, sketches: Iterable[Sketch]) -> Sketch:
        whole = cls()
        whole._counts = _sum_of(sketch._counts for sketch in sketches)
        return whole


def _sum_of(counters: Iterable[Counter[Key]]) -> Counter[Key]:
    """`sum` would copy what there is for each of them."""
    whole: dict[Key, int] = {}
    for counter in counters:
        for key, count in counter.items():
            whole[key] = whole.get(key, 0) + count
    return Counter(whole)


def _value_of(bucket: int) -> float:
    """The value with the least relative error for (growth^(bucket - 1), growth^bucket]."""
    return float(2 * _GROWTH**bucket / (_GROWTH + 1))


class Flow(NamedTuple):
    """KV that went from one member of the fleet to another."""

    source: str
    target: str
    kind: str  # handoff | fetch | offer


@dataclass(slots=True)
class Slot:
    """`hits` are prompt tokens whose KV was there, by where it was; `tokens` were generated."""

    number: int  # its time is [number, number + 1) * SLOT_S
    requests: int = 0  # that ended
    failed: int = 0
    good: int = 0
    tokens: float = 0.0
    prompt_tokens: int = 0  # that were computed, or found
    hits: Counter[str] = field(default_factory=Counter)
    ttft: Sketch = field(default_factory=Sketch)
    tpot: Sketch = field(default_factory=Sketch)
    flows: Counter[Flow] = field(default_factory=Counter)  # bytes

    def add_flow(self, flow: Flow, num_bytes: int) -> None:
        if flow in self.flows or len(self.flows) < MAX_FLOWS:
            self.flows[flow] += num_bytes


@dataclass(frozen=True, slots=True)
class Period:
    """Some slots that follow one another, and the seconds of them that have passed."""

    seconds: float
    slots: tuple[Slot, ...]

    def total(self, name: str) -> float:
        return float(sum(getattr(slot, name) for slot in self.slots))

    def rate(self, name: str) -> float:
        """Per second."""
        return self.total(name) / self.seconds

    def hits(self) -> Counter[str]:
        return _sum_of(slot.hits for slot in self.slots)

    def flows(self) -> Counter[Flow]:
        return _sum_of(slot.flows for slot in self.slots)

    def ttft(self) -> Sketch:
        return Sketch.merged(slot.ttft for slot in self.slots)

    def tpot(self) -> Sketch:
        return Sketch.merged(slot.tpot for slot in self.slots)


class Window:
    """The ring. Times are the loop's, and never go back."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._slots = deque([Slot(int(now // SLOT_S))], maxlen=SLOTS + 1)

    def current(self, now: float) -> Slot:
        """The slot of this moment, to be written to."""
        number = int(now // SLOT_S)
        last = self._slots[-1]
        if number <= last.number:
            return last
        for missing in range(max(last.number + 1, number - SLOTS), number + 1):
            self._slots.append(Slot(missing))
        return self._slots[-1]

    def spread_tokens(self, tokens: int, since: float, now: float) -> None:
        """`tokens` were generated evenly between two moments."""
        if tokens <= 0:
            return
        current = self.current(now)
        if since >= current.number * SLOT_S:
            current.tokens += tokens
            return
        for slot in reversed(self._slots):
            begin, end = slot.number * SLOT_S, (slot.number + 1) * SLOT_S
            if end <= since:
                break
            slot.tokens += tokens * (min(end, now) - max(begin, since)) / (now - since)

    def last(self, now: float, seconds: float) -> Period:
        """About the last `seconds`: whole slots, and the one that is being filled."""
        self.current(now)
        count = max(math.ceil(seconds / SLOT_S), 1)
        slots = tuple(islice(self._slots, max(len(self._slots) - count, 0), None))
        begin = max(slots[0].number * SLOT_S, self._began)
        return Period(
            max(now - begin, 1.0), slots
        )  # one second at least: rates of less mean nothing

    def history(self, now: float) -> Iterator[Slot | None]:
        """The last SLOTS whole slots, the oldest first; None from before this process."""
        self.current(now)
        whole = list(self._slots)[:-1]
        yield from [None] * (SLOTS - len(whole))
        yield from whole
