"""The fault harness itself: some seeds (`make test` runs 2,000 more), and every one repeatable."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sim.run
from sim.faults import main, run_many, summarize
from sim.loop import SimLoop
from sim.run import end_others, run_seed

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


def test_at_the_end_tasks_get_the_steps_that_their_clean_up_takes() -> None:
    """Otherwise they complain on standard error when Python finds them behind a closed loop."""
    loop = SimLoop()

    async def clean_up_slowly() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            for _ in range(5):
                await asyncio.sleep(0.1)

    async def main() -> None:
        tasks = [loop.create_task(clean_up_slowly()) for _ in range(2)]
        await asyncio.sleep(0)
        await end_others()
        assert all(task.cancelled() for task in tasks)

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


@pytest.mark.parametrize(("steps", "seed"), [(100, 0), (150, 3)])
def test_a_run_in_which_time_stood_still_leaves_no_task(
    steps: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[SimLoop] = []

    def make_loop() -> SimLoop:
        loops.append(SimLoop(steps))
        return loops[0]

    monkeypatch.setattr(sim.run, "SimLoop", make_loop)
    (violation,) = run_seed(seed).violations
    assert "time stands still" in violation
    assert not [task for task in asyncio.all_tasks(loops[0]) if not task.done()]


def test_the_command_replays_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "1", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert "seed 1: ok" in said
    assert "=> c0 register" in said
