"""The conductor's view of blocks, against one made of plain sets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from conductor import holder_sets
from conductor.matches import Match
from conductor.prefix_map import PrefixMap

PLENTY = 50_000
HOLDERS = ("prefill-0", "prefill-1", "decode-0", "store-0")
SLOWNESS = {tier: at for at, tier in enumerate(Tier)}


def key(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def keys(numbers: Iterable[int]) -> bytes:
    return b"".join(map(key, numbers))


# Some keys share a half with others, which chance never brings about.
HALVES = (bytes(8), b"\1" + bytes(7), key(0)[:8])
ODD_KEYS = tuple(low + high for low in HALVES for high in HALVES)
KEYS = ODD_KEYS + tuple(key(number) for number in range(30))
some_keys = st.lists(st.sampled_from(KEYS), max_size=12)


@dataclass
class Naive:
    """What PrefixMap does, in the obvious way."""

    max_blocks: int = PLENTY
    numbers: dict[str, int] = field(default_factory=dict)
    held: dict[tuple[str, Tier], set[bytes]] = field(default_factory=dict)
    dropped: int = 0

    def blocks(self) -> set[bytes]:
        return set().union(*self.held.values())

    def apply(self, holder: str, message: KvEvents | KvSnapshot) -> bool:
        if isinstance(message, KvSnapshot) and message.first:
            self.drop(holder)
            self.numbers[holder] = message.number
        if self.numbers.get(holder) != message.number:
            self.drop(holder)
            return False
        self.numbers[holder] += 1
        added = message.keys if isinstance(message, KvSnapshot) else message.added
        held = self.held.setdefault((holder, message.tier), set())
        for one in cut(added):
            if one in self.blocks() or len(self.blocks()) < self.max_blocks:
                held.add(one)
            else:
                self.dropped += 1
        if isinstance(message, KvEvents):
            held.difference_update(cut(message.removed))
        return True

    def drop(self, holder: str) -> None:
        self.numbers.pop(holder, None)
        for tier in Tier:
            self.held.pop((holder, tier), None)

    def holders(self, one: bytes) -> set[tuple[str, Tier]]:
        return {pair for pair, held in self.held.items() if one in held}

    def matches(self, chain: bytes) -> set[Match]:
        found = set()
        for holder in HOLDERS:
            longest = 0
            for slowest in Tier:
                blocks = self.run(holder, slowest, cut(chain))
                if blocks > longest:
                    found.add(Match(holder, slowest, blocks))
                    longest = blocks
        return found

    def run(self, holder: str, slowest: Tier, chain: list[bytes]) -> int:
        tiers = [tier for tier in Tier if SLOWNESS[tier] <= SLOWNESS[slowest]]
        for at, one in enumerate(chain):
            if not any(one in self.held.get((holder, tier), ()) for tier in tiers):
                return at
        return len(chain)


def cut(many: bytes) -> list[bytes]:
    return [many[at : at + 16] for at in range(0, len(many), 16)]


def check(real: PrefixMap, naive: Naive, everything: bool = True) -> None:
    for one in KEYS if everything else KEYS[:12]:
        holders = real.holders(one)
        assert len(set(holders)) == len(holders)
        assert set(holders) == naive.holders(one)
    assert real.num_blocks == len(naive.blocks())
    assert real.num_entries == sum(map(len, naive.held.values()))
    assert real.dropped == naive.dropped


def check_matches(real: PrefixMap, naive: Naive, chain: bytes) -> None:
    matches = real.matches(chain)
    found = list(matches)
    assert len(set(found)) == len(found)
    assert set(found) == naive.matches(chain)
    assert [match.blocks for match in found] == sorted((m.blocks for m in found), reverse=True)
    lengths, index_of = matches.lengths().tolist(), matches.roster.index_of
    assert lengths[-1] == 0
    for holder in HOLDERS:
        longest = max((match.blocks for match in found if match.holder == holder), default=0)
        assert lengths[index_of.get(holder, -1)] == longest
    for one in cut(chain):
        assert real.knows(one) is bool(naive.holders(one))


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, str, Tier, bytes, bytes]]:
    step = st.tuples(
        st.sampled_from(("events",) * 6 + ("first", "part", "gap", "drop", "look", "match")),
        st.sampled_from(HOLDERS),
        st.sampled_from(Tier),
        some_keys.map(b"".join),
        some_keys.map(b"".join),
    )
    begin = [("first", holder, Tier.GPU, b"", b"") for holder in HOLDERS[:3]]
    return begin + draw(st.lists(step, max_size=40))


def play(
    real: PrefixMap, naive: Naive, script: list[tuple[str, str, Tier, bytes, bytes]], look: bool
) -> None:
    for kind, holder, tier, one, other in script:
        number = naive.numbers.get(holder, 7)
        if kind == "drop":
            real.drop(holder)
            naive.drop(holder)
        elif kind == "match":
            check_matches(real, naive, one + other)
        elif kind != "look":
            message: KvEvents | KvSnapshot = KvEvents(number + (kind == "gap"), tier, one, other)
            if kind in ("first", "part"):
                message = KvSnapshot(number, tier, one, first=kind == "first", last=False)
            assert real.apply(holder, message) == naive.apply(holder, message)
        if look or kind == "look":
            check(real, naive, everything=not look)
    check(real, naive)


@settings(deadline=None, max_examples=100)
@given(steps())
def test_it_knows_what_plain_sets_know(script: list[tuple[str, str, Tier, bytes, bytes]]) -> None:
    play(PrefixMap(PLENTY), Naive(), script, look=False)


@settings(deadline=None, max_examples=100)
@given(steps(), st.integers(1, 20))
def test_blocks_beyond_the_bound_are_ignored_and_counted(
    script: list[tuple[str, str, Tier, bytes, bytes]], bound: int
) -> None:
    play(PrefixMap(bound), Naive(bound), script, look=True)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(HOLDERS), st.sampled_from(Tier), st.integers(0, 60), st.integers(0, 60)
        ),
        max_size=12,
    )
)
def test_matches_are_true_leading_runs(ranges: list[tuple[str, Tier, int, int]]) -> None:
    real, naive = PrefixMap(PLENTY), Naive()
    for holder in HOLDERS:
        for view in (real, naive):
            view.apply(holder, KvSnapshot(0, Tier.GPU, b"", first=True, last=True))
    for holder, tier, begin, end in ranges:
        message = KvEvents(naive.numbers[holder], tier, keys(range(begin, end)))
        assert real.apply(holder, message)
        naive.apply(holder, message)
    check_matches(real, naive, keys(range(60)))
    check_matches(real, naive, keys(range(30)) + keys(range(100, 130)))


def one_holder(max_blocks: int = PLENTY, name: str = "a") -> PrefixMap:
    view = PrefixMap(max_blocks)
    assert view.apply(name, KvSnapshot(0, Tier.GPU, b"", first=True, last=True))
    return view


def test_a_run_in_a_faster_tier_is_told_besides_the_longer_one() -> None:
    view = one_holder()
    view.apply("a", KvEvents(1, Tier.GPU, keys(range(3))))
    view.apply("a", KvEvents(2, Tier.NVME, keys(range(2, 9))))
    assert tuple(view.matches(keys(range(20)))) == (
        Match("a", Tier.NVME, 9),
        Match("a", Tier.GPU, 3),
    )
    view.apply("a", KvEvents(3, Tier.CPU, keys([0]), b""))
    view.apply("a", KvEvents(4, Tier.GPU, b"", keys([0])))
    assert tuple(view.matches(keys(range(20)))) == (
        Match("a", Tier.NVME, 9),
        Match("a", Tier.CPU, 3),
    )


def test_a_holder_without_the_first_block_has_nothing_to_offer() -> None:
    view = one_holder()
    view.apply("a", KvEvents(1, Tier.GPU, keys(range(1, 50))))
    assert tuple(view.matches(keys(range(50)))) == ()
    assert tuple(view.matches(b"")) == ()


def test_half_a_key_is_refused_at_once() -> None:
    view = one_holder()
    with pytest.raises(ValueError, match="16 bytes"):
        view.apply("a", KvEvents(1, Tier.GPU, key(0)[:8]))
    assert view.num_entries == 0


def test_after_a_gap_a_holder_has_nothing_until_its_next_snapshot() -> None:
    view = one_holder()
    view.apply("a", KvEvents(1, Tier.GPU, keys(range(5))))
    assert not view.apply("a", KvEvents(3, Tier.GPU, keys([7])))
    assert view.num_entries == 0
    assert not view.apply("a", KvEvents(4, Tier.GPU, keys([8])))
    assert not view.apply("a", KvSnapshot(5, Tier.GPU, keys([9]), first=False, last=True))
    assert view.apply("a", KvSnapshot(6, Tier.GPU, keys([1]), first=True, last=False))
    assert view.apply("a", KvSnapshot(7, Tier.CPU, keys([2]), first=False, last=True))
    assert view.holders(key(1)) == (("a", Tier.GPU),)
    assert view.holders(key(2)) == (("a", Tier.CPU),)
    assert view.num_blocks == 2


def test_dropped_holders_leave_no_block_and_no_name_behind() -> None:
    view = one_holder()
    view.apply("a", KvEvents(1, Tier.GPU, keys(range(3000))))
    view.drop("a")
    assert view.num_blocks == view.num_entries == 0
    view.apply("b", KvSnapshot(0, Tier.CPU, keys(range(10)), first=True, last=True))
    assert tuple(view.matches(keys(range(3000)))) == (Match("b", Tier.CPU, 10),)
    # Whoever comes next may use the space, in small steps or when it is needed.
    for number in range(1, 400):
        assert view.apply("b", KvEvents(number, Tier.CPU, keys([number])))
        assert view.num_blocks == max(10, number + 1)
    assert view.dropped == 0


def test_a_full_map_takes_the_space_of_dropped_holders() -> None:
    view = one_holder(1000)
    view.apply("a", KvEvents(1, Tier.GPU, keys(range(1500))))
    assert (view.num_blocks, view.dropped) == (1000, 500)
    view.drop("a")
    view.apply("b", KvSnapshot(0, Tier.GPU, keys(range(2000, 3000)), first=True, last=True))
    assert (view.num_blocks, view.dropped) == (1000, 500)
    assert tuple(view.matches(keys(range(2000, 3000)))) == (Match("b", Tier.GPU, 1000),)


def test_it_grows_and_still_knows_everything() -> None:
    view = one_holder()
    count = 30_000
    before = view.memory_bytes
    for number in range(1, 31):
        chain = keys(range((number - 1) * count // 30, number * count // 30))
        assert view.apply("a", KvEvents(number, Tier.GPU, chain))
    assert view.num_blocks == view.num_entries == count
    assert tuple(view.matches(keys(range(count)))) == (Match("a", Tier.GPU, count),)
    assert before < view.memory_bytes < 100 * count
    view.apply("a", KvEvents(31, Tier.GPU, b"", keys(range(1, count))))
    assert tuple(view.matches(keys(range(count)))) == (Match("a", Tier.GPU, 1),)
    assert view.num_blocks == 1


def test_a_map_whose_blocks_change_for_long_stays_as_it_is() -> None:
    view = one_holder(2500)
    number = 0
    sizes = []
    for begin in range(0, 100_000, 500):
        number += 1
        view.apply("a", KvEvents(number, Tier.GPU, keys(range(begin, begin + 500))))
        assert view.dropped == 0
        number += 1
        view.apply(
            "a",
            KvEvents(
                number, Tier.GPU, b"", keys(range(max(begin - 2000, 0), max(begin - 1500, 0)))
            ),
        )
        sizes.append(view.memory_bytes)
    assert view.num_blocks == view.num_entries == 2000
    assert max(sizes) < 2 * sizes[5]


def test_keys_that_all_want_the_same_place_are_bounded_not_lost_track_of() -> None:
    """Who can choose keys can fill a row; that row's overflow ends somewhere."""
    view = one_holder(4000)
    crowd = [bytes(8) + number.to_bytes(8, "big") for number in range(1, 4001)]
    view.apply("a", KvEvents(1, Tier.GPU, b"".join(crowd)))
    known = sum(bool(view.holders(one)) for one in crowd)
    assert known == view.num_blocks
    assert known + view.dropped == 4000
    view.apply("a", KvEvents(2, Tier.GPU, b"", b"".join(crowd)))
    assert view.num_blocks == 0


def test_many_holders_of_one_prefix() -> None:
    view = PrefixMap(PLENTY)
    names = [f"worker-{number}" for number in range(300)]
    for number, name in enumerate(names):
        view.apply(
            name, KvSnapshot(0, Tier.GPU, keys(range(20 + number % 3)), first=True, last=True)
        )
    matches = view.matches(keys(range(100)))
    assert matches.is_crowd
    assert {match.holder: match.blocks for match in matches} == {
        name: 20 + number % 3 for number, name in enumerate(names)
    }
    view.drop(names[0])
    view.apply("new", KvSnapshot(0, Tier.CPU, keys(range(20)), first=True, last=True))
    assert {match.holder for match in view.matches(keys(range(100)))} == {*names[1:], "new"}
    assert {match.holder for match in matches} == set(names)  # as it was when it was asked
    view.apply("newer", KvSnapshot(0, Tier.CPU, keys(range(20)), first=True, last=True))
    assert view.matches(keys(range(100))).roster.index_of["newer"] == len(names)
    assert view.num_blocks == 22


def test_too_many_different_sets_of_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    """An addition is ignored then, and a removal takes the block away from the others, too, unless
    there is one left."""
    monkeypatch.setattr("conductor.block_index._LEAST_SETS", 3)
    view = one_holder(100)
    view.apply("b", KvSnapshot(0, Tier.GPU, keys(range(10)), first=True, last=True))
    assert (view.num_blocks, view.num_entries, view.dropped) == (10, 10, 0)
    view.apply("a", KvEvents(1, Tier.GPU, keys(range(5))))
    assert (view.num_blocks, view.num_entries, view.dropped) == (10, 15, 0)
    view.apply("c", KvSnapshot(0, Tier.GPU, keys(range(3)), first=True, last=True))
    assert (view.num_blocks, view.num_entries, view.dropped) == (10, 18, 0)
    view.apply("c", KvEvents(1, Tier.GPU, keys(range(5, 20))))  # b and c together are too many
    assert (view.num_blocks, view.num_entries, view.dropped) == (20, 28, 5)
    view.apply("b", KvEvents(1, Tier.GPU, b"", key(0)))  # and so are a and c
    assert (view.num_blocks, view.num_entries, view.dropped) == (19, 25, 6)
    assert view.holders(key(0)) == ()
    view.apply("c", KvEvents(2, Tier.GPU, b"", keys(range(1, 3))))  # a and b are there
    assert (view.num_blocks, view.num_entries, view.dropped) == (19, 23, 6)
    view.apply("b", KvEvents(2, Tier.GPU, b"", keys(range(1, 10))))
    assert (view.num_blocks, view.num_entries, view.dropped) == (14, 14, 6)
    assert view.holders(key(1)) == (("a", Tier.GPU),)


@given(st.sets(st.integers(0, 50)))
def test_sets_of_holders_are_numbers(bits: set[int]) -> None:
    members = sum(1 << bit for bit in bits)
    assert holder_sets.bits_of(members) == sorted(bits)
    for bit in bits:
        assert holder_sets.pair_bit(*holder_sets.pair_of(bit)) == 1 << bit
