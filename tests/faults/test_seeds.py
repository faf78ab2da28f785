"""The fault harness itself: some seeds (`make test` runs 2,000 more), and every one repeatable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sim.faults import main, run_many, summarize
from sim.run import run_seed

SEEDS = 60
CHUNK = 20


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_nothing_goes_wrong_under_faults(first: int) -> None:
    outcomes = [run_seed(seed) for seed in range(first, first + CHUNK)]
    wrong = {one.seed: one.violations for one in outcomes if one.violations}
    assert not wrong, f"replay with: python -m sim.faults --seed {min(wrong)} --verbose"
    summary = summarize(outcomes, 0.0)
    assert summary["requests"] > 5 * CHUNK
    assert summary["error_share"] < 0.25, "a harness in which everything fails shows nothing"


def test_a_seed_is_the_same_run_in_every_process() -> None:
    """Whatever strings hash to, and wherever objects lie."""
    code = "from sim.run import run_seed; print(*(run_seed(n, True).digest for n in (2, 3, 5)))"
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


def test_processes_share_the_seeds_and_keep_their_order() -> None:
    outcomes = list(run_many(range(4), jobs=2))
    assert [one.seed for one in outcomes] == [0, 1, 2, 3]
    assert outcomes == list(run_many(range(4), jobs=1))


def test_the_parts_of_a_long_run_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{first}.json") for first in (0, 3)]
    for first, file in zip(("0", "3"), files, strict=True):
        assert main(["--first", first, "--seeds", "3", "--jobs", "1", "--json", file]) == 0
    capsys.readouterr()
    assert main(["sum", *files]) == 0
    total = json.loads(capsys.readouterr().out)
    whole = summarize(list(run_many(range(6), jobs=1)), total["wall_s"])
    # Each part is rounded to a tenth of a second.
    assert total.pop("virtual_s") == pytest.approx(whole.pop("virtual_s"), abs=0.2)
    assert total == whole
    assert total["seeds"] == 6


def test_the_command_replays_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "1", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert "seed 1: ok" in said
    assert "=> c0 register" in said
