"""A worker's part in sharing KV: what conductors are told, and fetching what sequences want."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.events import KvWanted
from baton.errors import PeerGone
from baton.types.fleet import Peer
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.types.link import FetchPart
from baton.types.request import AttemptId
from baton.worker import kv_news
from baton.worker.fetcher import Fetcher
from baton.worker.kv_news import Change, KvNews, PoolBook

X = AttemptId("x")


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def keys(*numbers: int) -> bytes:
    return b"".join(map(key, numbers))


@dataclass
class Book:
    """A holder with two tiers, changed by tests."""

    held: dict[Tier, set[int]] = field(default_factory=lambda: {Tier.CPU: set(), Tier.NVME: set()})
    changes: list[Change] = field(default_factory=list)

    def change(self, tier: Tier, added: Sequence[int] = (), removed: Sequence[int] = ()) -> None:
        self.held[tier] |= set(added)
        self.held[tier] -= set(removed)
        self.changes.append(Change(tier, keys(*added), keys(*removed)))

    def holdings(self) -> Iterable[tuple[Tier, bytes]]:
        return [(tier, keys(*held)) for tier, held in self.held.items() if held]

    def take_changes(self) -> Iterable[Change]:
        taken, self.changes = self.changes, []
        return taken


@dataclass
class View:
    """What a conductor knows from messages; numbers must not have gaps."""

    held: dict[Tier, set[bytes]] = field(default_factory=lambda: {t: set() for t in Tier})
    number: int = 0

    def hear(self, messages: Iterable[KvEvents | KvSnapshot]) -> None:
        for message in messages:
            assert message.number == self.number + 1
            self.number = message.number
            if isinstance(message, KvSnapshot):
                if message.first:
                    self.held = {tier: set() for tier in Tier}
                self.held[message.tier] |= split(message.keys)
            else:
                self.held[message.tier] |= split(message.added)
                self.held[message.tier] -= split(message.removed)

    def agrees(self, book: Book) -> bool:
        return all(self.held[tier] == {key(n) for n in held} for tier, held in book.held.items())


def split(data: bytes) -> set[bytes]:
    return {data[at : at + 16] for at in range(0, len(data), 16)}


@given(st.lists(st.sampled_from(["add", "remove", "a", "b", "resync b", "join"])), st.randoms())
def test_every_conductor_knows_what_is_held(steps: list[str], chance: random.Random) -> None:
    book = Book()
    news = KvNews(book)
    links = {name: (news.subscribe(), View()) for name in "ab"}
    for step in steps:
        tier = chance.choice([Tier.CPU, Tier.NVME])
        if step == "add":
            book.change(tier, added=[chance.randrange(8)])
        elif step == "remove" and book.held[tier]:
            book.change(tier, removed=[chance.choice(sorted(book.held[tier]))])
        elif step == "resync b":
            links["b"][0].resync()
        elif step == "join":
            links["a"][0].close()
            links["a"] = (news.subscribe(), View())
        elif step in links:
            subscription, view = links[step]
            view.hear(subscription.take())
            assert view.agrees(book)
    for subscription, view in links.values():
        view.hear(subscription.take())
        assert view.agrees(book)
        assert not subscription.take()


def test_a_snapshot_comes_in_parts_and_an_empty_one_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_news, "PART_BYTES", 32)
    book = Book()
    (empty,) = KvNews(book).subscribe().take()
    assert empty == KvSnapshot(1, Tier.GPU, b"", first=True, last=True)
    book.change(Tier.CPU, added=range(3))
    book.change(Tier.NVME, added=[9])
    parts = KvNews(book).subscribe().take()
    flags = [(p.tier, len(p.keys), p.first, p.last) for p in parts if isinstance(p, KvSnapshot)]
    assert flags == [
        (Tier.CPU, 32, True, False),
        (Tier.CPU, 16, False, False),
        (Tier.NVME, 16, False, True),
    ]


def test_who_falls_behind_gets_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_news, "BACKLOG_BYTES", 40)
    book = Book()
    news = KvNews(book)
    slow, view = news.subscribe(), View()
    view.hear(slow.take())
    for number in range(3):
        book.change(Tier.CPU, added=[number])
        news.distribute()
    messages = slow.take()
    assert [type(message) for message in messages] == [KvSnapshot]
    view.hear(messages)
    assert view.agrees(book)


def test_a_pool_is_a_book_of_one_tier() -> None:
    class Pool:
        def keys(self) -> bytes:
            return keys(1, 2)

        def take_changes(self) -> tuple[bytes, bytes]:
            return b"", b""

    book = PoolBook(Pool())
    assert list(book.holdings()) == [(Tier.GPU, keys(1, 2))]
    assert list(book.take_changes()) == []


# -- fetching ---------------------------------------------------------------------------------


@dataclass
class FakeBorrower:
    """`has`: how many of the asked blocks each source lends; an exception is raised."""

    has: dict[str, int | Exception]
    asked: list[tuple[str, bytes, tuple[int, ...]]] = field(default_factory=list)
    hold: asyncio.Event | None = None
    aborted: int = 0

    async def borrow(
        self,
        peer: Peer,
        keys: bytes,
        place: Sequence[int],
        *,
        layer_groups: int,
        on_layers: Callable[[int, int], None],
        timeout_s: float,
    ) -> int:
        self.asked.append((peer.name, keys, tuple(place)))
        if self.hold is not None:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.aborted += 1
                raise
        answer = self.has[peer.name]
        if isinstance(answer, Exception):
            raise answer
        count = min(answer, len(place))
        for blocks in {1, count}:
            for layer_end in range(1, layer_groups + 1):
                on_layers(blocks, layer_end)
        return count


@dataclass
class FakeEngine:
    came: list[tuple[int, int]] = field(default_factory=list)
    whole: list[tuple[int, int]] = field(default_factory=list)

    def layers_came(self, sequence: int, layer_end: int) -> None:
        assert not self.whole, "it has come already"
        self.came.append((sequence, layer_end))

    def arrived(self, sequence: int, blocks: int) -> None:
        self.whole.append((sequence, blocks))


def part(source: str, first: int, count: int) -> FetchPart:
    return FetchPart(Peer(source, "1", "host:1"), first, count, Tier.CPU)


WANTED = KvWanted(7, X, 1, (11, 12, 13), keys(1, 2, 3))  # logical blocks 1, 2, 3


@pytest.mark.parametrize("layer_groups", [0, 2])
@pytest.mark.parametrize(
    ("parts", "has", "came"),
    [
        ([("a", 0, 4)], {"a": 9}, 3),
        ([("a", 0, 3)], {"a": 9}, 2),
        ([("b", 2, 2), ("a", 0, 2)], {"a": 9, "b": 9}, 3),
        ([("a", 0, 2), ("b", 2, 2)], {"a": 0, "b": 9}, 0),
        ([("a", 0, 2), ("b", 2, 2)], {"a": 9, "b": 1}, 2),
        ([("a", 0, 3), ("b", 1, 3)], {"a": 9, "b": 9}, 3),
        ([("a", 0, 4)], {"a": PeerGone("gone")}, 0),
        ([("a", 0, 4)], {"a": RuntimeError("a bug")}, 0),
        ([], {}, 0),
    ],
)
async def test_a_fetch_goes_from_source_to_source(
    parts: list[tuple[str, int, int]],
    has: dict[str, int | Exception],
    came: int,
    layer_groups: int,
) -> None:
    engine = FakeEngine()
    borrower = FakeBorrower(has)
    fetcher = Fetcher(borrower, engine, layer_groups)
    running = asyncio.create_task(fetcher.run())
    await asyncio.sleep(0)
    fetcher.plan(X, tuple(part(*one) for one in parts))
    fetcher.want(WANTED)
    async with asyncio.timeout(10):
        while not engine.whole:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert engine.whole == [(7, came)]
    # Layer by layer when that is all there is to come, and no earlier.
    assert engine.came == ([(7, 1), (7, 2)] if came == 3 and layer_groups else [])
    for _, wanted, place in borrower.asked:
        assert len(wanted) == 16 * len(place)
        assert [key(block - 10) for block in place] == [
            wanted[at : at + 16] for at in range(0, len(wanted), 16)
        ]
    running.cancel()
    await asyncio.wait([running])


def test_a_plan_reaches_up_to_its_first_gap() -> None:
    fetcher = Fetcher(FakeBorrower({}), FakeEngine(), 1)
    assert fetcher.plan(X, (part("a", 0, 4), part("b", 4, 2))) == 6
    assert fetcher.plan(X, (part("b", 3, 2), part("a", 0, 2))) == 2
    assert fetcher.plan(X, (part("b", 4, 2),)) == 6  # the worker has the four before
    assert fetcher.plan(X, (part("b", 4, 2), part("c", 7, 1))) == 6
    assert fetcher.plan(X, ()) == 0


async def test_who_is_forgotten_or_shut_down_while_fetching_is_told_of_all_the_same() -> None:
    for stop in ("forget", "forget at once", "close"):
        engine = FakeEngine()
        borrower = FakeBorrower({"a": 4}, hold=asyncio.Event())
        fetcher = Fetcher(borrower, engine, layer_groups=2)
        running = asyncio.create_task(fetcher.run())
        await asyncio.sleep(0)
        fetcher.plan(X, (part("a", 0, 4),))
        fetcher.want(WANTED)
        async with asyncio.timeout(10):
            while not borrower.asked and stop != "forget at once":  # noqa: ASYNC110
                await asyncio.sleep(0)
            if stop != "close":
                fetcher.forget(X)
            else:
                running.cancel()
            while not engine.whole:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert engine.whole == [(7, 0)]
        assert not engine.came
        assert borrower.aborted == len(borrower.asked)
        running.cancel()
        await asyncio.wait([running])
