"""The cheapest fleet for a trace: the estimate, the search, and the program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ConfigError
from sim.costs.compute import Prefill
from sim.sizing.__main__ import main
from sim.sizing.demand import Machine, demand
from sim.sizing.search import MOST_LOAD, Fleet, Outcome, Search, Simulate, least
from sim.workload.trace import Request, trace_line


class Straight:
    """Seconds: 0.001 for each prompt token, 0.01 for a step and 0.001 for each decode in it."""

    def seconds(self, prefill: Sequence[Prefill], decode: Sequence[int]) -> float:
        return 0.001 * sum(part.new for part in prefill) + (0.01 + 0.001 * len(decode))


def asked(count: int, shared: bool) -> list[Request]:
    return [
        Request(1.0 * n, 1024, 101, (0, 1) if shared else (2 * n, 2 * n + 1)) for n in range(count)
    ]


def test_the_estimate_is_the_work_over_the_time() -> None:
    machine = Machine(Straight(), kv_blocks=10_000, max_seqs=256)
    found = demand(asked(11, shared=False), machine, 10.0, 0.05)
    assert found.batch == 40  # 0.05 s are 40 decodes
    assert not found.kv_bound
    assert found.prefill == pytest.approx(11 * (1.024 + 0.01) / 20)
    assert found.decode == pytest.approx(1100 * 0.05 / 40 / 20)
    assert found.workers == (1, 1)


def test_what_is_shared_is_computed_once_and_memory_bounds_the_batch() -> None:
    machine = Machine(Straight(), kv_blocks=30, max_seqs=256)
    found = demand(asked(11, shared=True), machine, 10.0, 0.05)
    assert found.prefill == pytest.approx((1.034 + 10 * 0.011) / 20)
    assert (found.batch, found.kv_bound) == (10, True)  # of 3 blocks each


def needs(prefill: int, decode: int, coupled: int) -> Simulate:
    """What becomes of fleets when a load needs so many workers: nine in ten, or fewer."""

    def simulate(fleet: Fleet, load: float) -> Outcome:
        if not fleet.prefill:
            good = min(1.0, 0.951 * fleet.rest / (coupled * load))
            return Outcome(good, good, good)
        ttft = min(1.0, 0.951 * fleet.prefill / (prefill * load))
        tbt = min(1.0, 0.951 * fleet.rest / (decode * load))
        return Outcome(min(ttft, tbt), ttft, tbt)

    return simulate


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_the_search_finds_the_smallest_from_any_estimate(
    prefill: int, decode: int, first: int, then: int
) -> None:
    search = Search(needs(prefill, decode, 30), 0.95, 64)
    assert search.disaggregated(first, then) == Fleet(prefill, decode)
    assert len(search.tried) < 40


def test_coupled_workers_are_only_looked_for_among_as_many() -> None:
    search = Search(needs(3, 3, 5), 0.95, 64)
    assert search.coupled(6) == Fleet(0, 5)
    assert search.coupled(4) is None


def test_the_margin_is_the_load_that_it_takes() -> None:
    search = Search(needs(2, 2, 2), 0.95, 64)
    assert search.margin(Fleet(2, 2)) == 1.0
    assert search.margin(Fleet(3, 3)) == pytest.approx(1.5)
    assert search.margin(Fleet(2000, 2000)) == MOST_LOAD


def test_nothing_is_simulated_twice() -> None:
    seen: list[tuple[Fleet, float]] = []
    inner = needs(4, 7, 9)

    def simulate(fleet: Fleet, load: float) -> Outcome:
        seen.append((fleet, load))
        return inner(fleet, load)

    search = Search(simulate, 0.95, 64)
    fleet = search.disaggregated(1, 1)
    search.margin(fleet)
    assert len(seen) == len(set(seen)) == len(search.tried)


def test_slos_that_no_fleet_keeps_are_told() -> None:
    with pytest.raises(ConfigError, match="no fleet of 8 nodes keeps the SLOs for 95%"):
        Search(needs(6, 6, 6), 0.95, 8).disaggregated(1, 1)


@given(st.integers(1, 200), st.integers(0, 200))
def test_least(wanted: int, more: int) -> None:
    assert least(wanted + more, lambda n: n >= wanted) == wanted


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.jsonl"
    requests = [Request(0.4 * n, 8192, 33, tuple(range(16 * n, 16 * n + 16))) for n in range(12)]
    file.write_bytes(b"".join(map(trace_line, requests)))
    return file


def test_the_program_prints_the_fleet_and_its_margin(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trace", str(trace), "--slo", "ttft=2.5,tbt=0.1", "--grain", "128"]
    assert main([*arguments, "--json", "-"]) == 0
    said = capsys.readouterr()
    body = orjson.loads(said.out)
    tried = {(one["fleet"], one["load"]): one["good"] for one in body["tried"]}
    assert "estimate: " in said.err
    assert "\r" not in said.err  # a progress bar is for people
    assert body["fleet"].endswith("P+1D")
    assert body["outcome"]["good"] >= body["share"] == 0.9
    fewer = int(body["fleet"].partition("P")[0]) - 1
    assert fewer
    assert tried[f"{fewer}P+1D", 1.0] < 0.9
    if body["load"] > 1:
        assert tried[body["fleet"], body["load"]] >= 0.9
    assert tried[body["fleet"], round(body["load"] + 0.05, 6)] < 0.9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slo", "ttft=1"], "--slo takes ttft=SECONDS,tbt=SECONDS"),
        (["--slo", "ttft=1,tbt=0"], "--slo takes"),
        (["--slo", "ttft=1,tbt=1,e2e=3"], "--slo takes"),
        (["--slo", "ttft=1,tbt=1", "--share", "1.5"], "--share is above 0"),
        (["--slo", "ttft=1,tbt=1", "--node", "9xH100"], "no machine"),
        (["--slo", "ttft=1,tbt=1", "--first", "0"], "has no requests"),
        (["--slo", "ttft=1,tbt=1", "--json", "/nowhere/at/all"], "there is no directory"),
        (["--slo", "ttft=1,tbt=1", "--trace", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_input_is_told_before_anything_is_simulated(
    trace: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--trace", str(trace), *flags])
    assert message in str(ended.value)
