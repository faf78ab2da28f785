"""What `make chaos` says of a run, and what counts as a problem."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.chaos import report
from bench.chaos.cells import Result, make_cells
from bench.chaos.checks import Problems, find_difference, held
from bench.chaos.cluster import Leftovers, Shape
from bench.chaos.faults import Fault, Kind, Recovery
from bench.chaos.phases import Phase
from bench.chaos.repetition import Cell, Outcome

NOTHING = Leftovers((), (), (), {"redis": 0})
USUAL = Outcome(
    *(Cell(Kind.PREFILL, Phase.DECODING, Fault.NONE), "prefill-0", 9, Problems()),
    *(2.0, ("conductor-0: prefill-0 > decode-0: complete",), 0, Recovery()),
)
KILLED = replace(
    USUAL,
    cell=Cell(Kind.DECODE, Phase.DECODING, Fault.KILL),
    marked_s=3.5,
    recovery=Recovery(recovery_s=4.0),
)


def rows(*outcomes: Outcome) -> list[list[str]]:
    result = Result(outcomes, (), NOTHING)
    table = report.as_markdown([report.content("command", Shape(), result)])
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_row_says_what_was_lost_and_how_long_it_took() -> None:
    bad = replace(KILLED, marked_s=4.5, problems=Problems(lost=("a", "b"), wrong=("c",)))
    hit, total = rows(USUAL, KILLED, bad)
    assert hit[:3] == ["decode", "decoding", "SIGKILL"]
    assert hit[3:] == ["2", "18", "2", "1", "0", "2.0 / 2.5", "–", "4.0 / 4.0"]
    assert total[3:8] == ["2", "18", "2", "1", "0"]


def test_what_is_not_good() -> None:
    assert USUAL.good
    assert KILLED.good
    assert not replace(KILLED, recovery=Recovery()).good
    for problems in (Problems(("a",)), Problems(wrong=("a",)), Problems(leaked=("a",))):
        assert not replace(KILLED, problems=Problems() + problems).good
    assert Result((KILLED,), (), NOTHING).good
    assert not Result((KILLED,), (), replace(NOTHING, segments=("/dev/shm/x",))).good
    assert not Result((KILLED,), (), replace(NOTHING, exit_codes={"redis": -9})).good


def test_every_combination_is_there_once() -> None:
    cells = make_cells(tuple(Kind), tuple(Phase), (Fault.KILL, Fault.STOP))
    assert len(cells) == len(set(cells)) == len(Phase) + len(Kind) * len(Phase) * 2


def test_tokens_are_compared_to_the_last() -> None:
    assert not find_difference([1, 2, 3], (1, 2, 3))
    assert find_difference([1, 2], (1, 2, 3)).endswith("the first difference at 2")
    assert find_difference([1, 9, 3], (1, 2, 3)).endswith("the first difference at 1")


@pytest.mark.parametrize(
    ("blocks", "running", "says"),
    [
        ({"free": 3, "cached": 7}, 0, ""),
        ({"free": 3, "cached": 6, "leased": 1}, 0, "leased"),
        ({"free": 3, "cached": 6}, 0, "accounted"),
        ({"free": 10}, 1, "running"),
    ],
)
def test_blocks_that_are_held(blocks: dict[str, int], running: int, says: str) -> None:
    load = {"running": running, "waiting": 0}
    member = {"state": "live", "role": "decode", "blocks": blocks, "num_blocks": 10} | load
    found = list(held({"decode-0": member}))
    assert bool(found) is bool(says)
    assert all(says in text for text in found)
    assert not list(held({"decode-0": member | {"state": "dead"}}))
