"""Generated traces have the rates, lengths and shared prefixes that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, pairwise, takewhile

import numpy as np
import pytest

from sim.workload.__main__ import main
from sim.workload.arrivals import bursts, diurnal, poisson
from sim.workload.generate import (
    Lengths,
    Shape,
    Talks,
    Tree,
    conversations,
    faded,
    mixed,
    plain,
    prefixes,
)
from sim.workload.make import KINDS
from sim.workload.trace import Request, blocks_of

FIXED = Shape(Lengths(1000), Lengths(100))


@pytest.mark.parametrize("arrivals", [poisson, bursts, diurnal])
def test_arrivals_ascend_at_the_mean_rate(
    arrivals: Callable[[float, int], Iterator[float]],
) -> None:
    times = list(islice(arrivals(5.0, 1), 40_000))
    assert all(a < b for a, b in pairwise(times))
    assert len(times) / times[-1] == pytest.approx(5, rel=0.1)
    assert times == list(islice(arrivals(5.0, 1), 40_000))
    assert times != list(islice(arrivals(5.0, 2), 40_000))


def dispersion(times: list[float]) -> float:
    """Variance over mean of the arrivals in a second: 1 for Poisson arrivals."""
    counts = np.bincount(np.array(times, dtype=int))
    return float(counts.var() / counts.mean())


def test_bursts_are_burstier_than_poisson_arrivals() -> None:
    assert dispersion(list(islice(poisson(5.0, 1), 20_000))) == pytest.approx(1, abs=0.1)
    assert dispersion(list(islice(bursts(5.0, 1), 20_000))) > 3


def test_a_day_has_its_peak_in_the_middle() -> None:
    times = np.array(list(takewhile(lambda at: at < 1000, diurnal(20.0, 3, 1000.0, 0.5))))
    quarters = np.histogram(times, bins=[0, 250, 500, 750, 1000])[0] / 250
    low, high = 20 * (1 - 0.5 * 2 / np.pi), 20 * (1 + 0.5 * 2 / np.pi)
    assert quarters == pytest.approx([low, high, high, low], rel=0.08)


def test_lengths_have_their_mean_and_bounds() -> None:
    shape = Shape(Lengths(3000, 1.0), Lengths(200, 0.5, most=300))
    made = list(islice(plain(poisson(1, 0), shape, 0), 5000))
    assert np.mean([r.input_tokens for r in made]) == pytest.approx(3000, rel=0.1)
    assert max(r.output_tokens for r in made) == 300
    ids = [block for r in made for block in r.blocks]
    assert len(set(ids)) == len(ids)


def check_chains(requests: list[Request]) -> None:
    """An id comes after the same ids wherever it is."""
    before: dict[int, int | None] = {}
    for request in requests:
        assert len(request.blocks) == blocks_of(request.input_tokens)
        for earlier, block in pairwise((None, *request.blocks)):
            assert block is not None
            assert before.setdefault(block, earlier) == earlier


def test_prefixes_are_shared_by_popularity() -> None:
    tree = Tree(depth=2, fan_out=4, node_tokens=1300, zipf=1.0)
    made = list(islice(prefixes(poisson(1, 0), FIXED, tree, 7), 4000))
    check_chains(made)
    assert {r.input_tokens for r in made} == {3600}
    roots = sorted(np.bincount([r.blocks[0] for r in made]).tolist(), reverse=True)[:4]
    assert np.array(roots) / 4000 == pytest.approx([0.48, 0.24, 0.16, 0.12], abs=0.03)
    assert len({r.blocks[:5] for r in made}) == 16  # 2,600 tokens: five whole blocks
    assert len({r.blocks[5] for r in made}) == 4000


def test_turns_repeat_what_was_said() -> None:
    talks = Talks(turns=3, think_s=10, system_tokens=1024, answer_s_per_token=0.1)
    made = list(islice(conversations(poisson(0.5, 0), FIXED, talks, 7), 3000))
    check_chains(made)
    assert all(a.at_s <= b.at_s for a, b in pairwise(made))
    assert len({r.blocks[:2] for r in made}) == 1
    first = [r for r in made if r.input_tokens == 2024]
    assert len(made) / len(first) == pytest.approx(3, rel=0.1)
    talk = [r for r in made if r.blocks[2] == first[0].blocks[2]]
    assert [r.input_tokens for r in talk] == [2024 + 1100 * turn for turn in range(len(talk))]
    two = next(r for r in made if r.input_tokens == 3124)
    one = next(r for r in first if r.blocks[2] == two.blocks[2])
    assert one.blocks[:3] == two.blocks[:3]
    assert one.blocks[3] != two.blocks[3]  # it was not full, and now begins otherwise
    assert all(later.at_s - earlier.at_s > 10 for earlier, later in pairwise(talk))  # the answer


def test_a_conversation_ends_before_it_is_too_long() -> None:
    talks = Talks(turns=1000, most_tokens=6000)
    made = list(islice(conversations(poisson(0.01, 0), FIXED, talks, 7), 200))
    assert max(r.input_tokens for r in made) == 2024 + 3 * 1100


def test_a_mix_shares_nothing_and_shifts() -> None:
    long, short = Shape(Lengths(5000), Lengths(10)), Shape(Lengths(50), Lengths(900))
    streams = [
        faded(plain(poisson(2, seed), shape, seed), (100, 300), shares, seed)
        for seed, (shape, shares) in enumerate([(long, (1, 0)), (short, (0, 1))])
    ]
    made = list(islice(mixed(*streams), 1000))
    assert all(a.at_s <= b.at_s for a, b in pairwise(made))
    ids = [block for r in made for block in r.blocks]
    assert len(set(ids)) == len(ids)
    assert {r.input_tokens for r in made if r.at_s < 100} == {5000}
    assert {r.input_tokens for r in made if r.at_s > 300} == {50}
    middle = [r.input_tokens for r in made if 150 < r.at_s < 250]
    assert middle.count(5000) / len(middle) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_made(kind: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    command = ["make", kind, "--requests", "200", "--arrivals", "bursts"]
    assert main([*command, "--seed", "3"]) == 0
    made = capfdbinary.readouterr().out
    assert made.count(b"\n") == 200
    main([*command, "--seed", "3"])
    assert capfdbinary.readouterr().out == made
    main([*command, "--seed", "4"])
    assert capfdbinary.readouterr().out != made
