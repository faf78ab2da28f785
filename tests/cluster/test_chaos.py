"""A small part of `make chaos`: processes are killed and stopped under load, no token is lost."""

from __future__ import annotations

import pytest

from bench.chaos.cells import run_cells
from bench.chaos.cluster import Shape
from bench.chaos.faults import Fault, Kind
from bench.chaos.phases import Phase
from bench.chaos.repetition import Cell
from tests.redis_server import BINARY, WHY_NOT

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(BINARY is None, reason=WHY_NOT),
]

CELLS = (
    Cell(Kind.CONDUCTOR, Phase.DECODING, Fault.KILL),
    Cell(Kind.REDIS, Phase.PREFILLING, Fault.KILL),
    Cell(Kind.STORE, Phase.DECODING, Fault.KILL),
    Cell(Kind.PREFILL, Phase.TRANSFERRING, Fault.STOP),
    Cell(Kind.DECODE, Phase.DECODING, Fault.KILL),
)


async def test_no_request_no_token_and_no_block_is_lost() -> None:
    result = await run_cells(Shape(), CELLS, rounds=1)
    assert len(result.outcomes) + len(result.missed) == len(CELLS)
    assert len(result.missed) <= 2, result.missed  # a slow machine may hide a phase
    for outcome in result.outcomes:
        assert outcome.good, outcome
    assert result.left.nothing, result.left
