"""The fault harness with several conductors, a registry, and clients that reconnect."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sim.faults import main, summarize
from sim.plan import make_plan
from sim.plan_conductors import make_plan_of_several
from sim.run import run_seed_of_several

SEEDS = 60
CHUNK = 20


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_nothing_goes_wrong_under_faults(first: int) -> None:
    outcomes = [run_seed_of_several(seed) for seed in range(first, first + CHUNK)]
    wrong = {one.seed: one.violations for one in outcomes if one.violations}
    assert not wrong, f"replay: python -m sim.faults --conductors --seed {min(wrong)} --verbose"
    summary = summarize(outcomes, 0.0)
    assert summary["requests"] > 5 * CHUNK
    assert summary["error_share"] < 0.15, "a harness in which everything fails shows nothing"


def test_a_seed_is_that_of_one_conductor_and_more() -> None:
    for seed in range(20):
        one, several = make_plan(seed), make_plan_of_several(seed)
        assert set(one.faults) <= set(several.faults)
        assert several.shape.conductors[0] == one.shape.conductors[0]
        assert [c.prompt for c in several.clients] == [c.prompt for c in one.clients]


def test_a_seed_is_the_same_run_whatever_strings_hash_to() -> None:
    code = (
        "from sim.run import run_seed_of_several as r; print(*(r(n, True).digest for n in (3, 8)))"
    )
    digests = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_the_command_replays_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--conductors", "--seed", "12", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert "seed 12: ok" in said
    assert "=> registry announce" in said
