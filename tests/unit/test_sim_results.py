"""The runner of published experiments: what it keeps, and what it writes on the page."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sim.fleet.result import Result
from sim.fleet.spec import FleetSpec
from sim.results import runs as runs_module
from sim.results.__main__ import main
from sim.results.experiments import EXPERIMENTS
from sim.results.experiments.caches import CACHES
from sim.results.experiments.common import effective
from sim.results.experiments.experiment import Column, Experiment, Row
from sim.results.experiments.search import Search
from sim.results.markdown import NOT_RUN
from sim.results.page import BY_HAND, Findings, findings, page
from sim.results.runs import ONE_TOKEN, Outcome, Replay, Run, Runs, sources_digest
from sim.workload.make import made_by
from sim.workload.trace import Request, trace_line

SMALL = FleetSpec("1P+1D", kv_blocks=64)
RUN = Run(SMALL, Replay(first=3))
TOY = Experiment(
    "toy",
    "A toy",
    "Leads.",
    (Column("TTFT", lambda o: o.result.totals["ttft_s"]["mean"], "{:.3f} s", over_first=True),),
    (Row("small", SMALL, {"TTFT": 2.0}), Row("reuse none", replace(SMALL, seed=1), {"TTFT": 3.0})),
    quick=Replay(first=3),
    full=Replay(),
    why="Because.",
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    requests = [Request(float(n), 1000, 40, (n, n + 100)) for n in range(5)]
    path.write_bytes(b"".join(trace_line(request) for request in requests))
    return path


def counted(monkeypatch):
    """The runs that are simulated from now on."""
    simulated = []
    simulate = runs_module.simulate

    def count(spec, requests, workload):
        simulated.append(spec)
        return simulate(spec, requests, workload)

    monkeypatch.setattr(runs_module, "simulate", count)
    return simulated


def test_what_was_simulated_is_not_simulated_again(trace, tmp_path, monkeypatch):
    simulated = counted(monkeypatch)
    first = Runs(trace, tmp_path / "kept").outcome(RUN)
    again = Runs(trace, tmp_path / "kept").outcome(RUN)
    assert len(simulated) == 1
    assert first is not None
    assert again is not None
    assert again.result.totals == first.result.totals
    assert again.result.totals["requests"] == 3
    assert again.cpu_s == first.cpu_s


def test_another_size_seed_trace_or_source_is_another_run(trace, tmp_path, monkeypatch):
    simulated = counted(monkeypatch)
    kept = tmp_path / "kept"
    runs = Runs(trace, kept)
    runs.outcome(RUN)
    runs.outcome(replace(RUN, replay=Replay(first=2)))
    runs.outcome(replace(RUN, spec=replace(SMALL, seed=1)))
    monkeypatch.setattr(runs_module, "sources_digest", lambda: "another")
    Runs(trace, kept).outcome(RUN)
    monkeypatch.undo()
    simulated_before = len(simulated)
    trace.write_bytes(trace.read_bytes() + trace_line(Request(9.0, 1000, 40, (7,))))
    assert Runs(trace, kept, only_kept=True).outcome(RUN) is None
    assert simulated_before == 4


def test_a_run_that_was_stopped_while_it_was_written_is_done_again(trace, tmp_path, monkeypatch):
    def stopped(result, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    runs = Runs(trace, tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(runs_module, "write_result", stopped)
        with pytest.raises(KeyboardInterrupt):
            runs.outcome(RUN)
    assert runs.outcome(RUN) is not None


def test_sources_are_those_that_simulate(tmp_path):
    (tmp_path / "conductor").mkdir()
    (tmp_path / "sim" / "results").mkdir(parents=True)
    (tmp_path / "conductor" / "router.py").write_text("a")
    before = sources_digest(tmp_path)
    (tmp_path / "sim" / "results" / "page.py").write_text("only reads")
    assert sources_digest(tmp_path) == before
    (tmp_path / "conductor" / "router.py").write_text("b")
    assert sources_digest(tmp_path) != before


def test_a_command_says_what_differs_from_the_defaults():
    run = Run(SMALL, Replay(first=7, output_scale=ONE_TOKEN))
    assert run.command() == (
        "python -m sim.fleet --trace FILE --cluster 1P+1D --kv-blocks 64 "
        "--first 7 --output-scale 1e-06"
    )


def test_a_generated_trace_is_replayed_as_from_its_file(trace, tmp_path):
    words = "prefixes --levels 1 --fan-out 2 --node-tokens 1024 --input 600 --output 20"
    run = Run(SMALL, Replay(first=4, speed=2.0, make=words))
    assert run.command() == (
        f"python -m sim.fleet --trace <(python -m sim.workload make {words}) "
        "--cluster 1P+1D --kv-blocks 64 --first 4 --speed 2.0"
    )
    found = outcome(Runs(trace, tmp_path / "kept"), run)
    made = tmp_path / "made.jsonl"
    made.write_bytes(b"".join(map(trace_line, itertools.islice(made_by(words), 10))))
    as_file = outcome(Runs(made, tmp_path / "kept"), Run(SMALL, Replay(first=4, speed=2.0)))
    assert found.result.totals == as_file.result.totals
    assert found.requests == as_file.requests
    assert found.requests[0].at_s == 0


def test_a_row_with_a_generated_trace_has_a_run_of_its_own():
    experiment = replace(TOY, rows=(Row("recorded", SMALL), Row("made", SMALL, make="plain")))
    recorded, made = experiment.runs(TOY.quick)
    assert recorded.replay == TOY.quick
    assert made.replay == replace(TOY.quick, make="plain")
    assert "make" not in recorded.as_json()["replay"]


def test_a_row_may_be_faster_than_the_others():
    experiment = replace(TOY, rows=(Row("as fast", SMALL), Row("faster", SMALL, speed=1.5)))
    speeds = [run.replay.speed for run in experiment.runs(Replay(first=3, speed=2.0))]
    assert speeds == [2.0, 3.0]


def test_a_load_that_changes_is_replayed_and_said(trace, tmp_path):
    run = Run(SMALL, Replay(first=4, load="0:0.5,4:2"))
    assert run.command().endswith("--first 4 --load 0:0.5,4:2")
    found = outcome(Runs(trace, tmp_path / "kept"), run)
    assert [request.at_s for request in found.requests] == [0.0, 2.0, 4.0, 4.5]


def outcome(runs: Runs, run: Run) -> Outcome:
    found = runs.outcome(run)
    assert found is not None
    return found


def test_the_page_has_simulated_and_published_figures_and_their_ratios(trace, tmp_path):
    runs = Runs(trace, tmp_path / "kept")
    found = outcome(runs, RUN)
    text = page([Findings(TOY, (RUN, RUN), (found, None))], "abc", "")
    mean = found.result.totals["ttft_s"]["mean"]
    assert f"| small | {mean:.3f} s | 1.00 | 2.000 s | 1.00 |" in text
    assert f"| reuse none | {NOT_RUN} |  | 3.000 s | 1.50 |" in text
    assert "The first 3 requests of the trace; 1 of 2 runs" in text
    assert RUN.command() in text
    assert "Because." in text


def test_the_full_size_is_shown_unless_more_of_the_quick_one_was_run(trace, tmp_path):
    runs, kept = Runs(trace, tmp_path / "kept"), Runs(trace, tmp_path / "kept", only_kept=True)
    assert findings(TOY, kept).outcomes == (None, None)
    assert f"{NOT_RUN.capitalize()}." in page([findings(TOY, kept)], "abc", "")
    runs.outcome(RUN)
    assert findings(TOY, kept).runs[0].replay == TOY.quick
    runs.outcome(Run(SMALL, TOY.full))
    assert findings(TOY, kept).runs[0].replay == TOY.full
    runs.outcome(TOY.runs(TOY.quick)[1])
    assert findings(TOY, kept).runs[0].replay == TOY.quick


def test_a_section_that_these_sources_did_not_run_stays_as_it_was(trace, tmp_path):
    found = outcome(Runs(trace, tmp_path / "kept"), RUN)
    other = replace(TOY, title="Another")
    ran, did_not = (found, None), (None, None)
    both = [Findings(TOY, (RUN, RUN), ran), Findings(other, (RUN, RUN), did_not)]
    before = page(both, "abc", f"{BY_HAND}\n\n## By hand\n")
    both = [Findings(TOY, (RUN, RUN), did_not), Findings(other, (RUN, RUN), ran)]
    after = page(both, "def", before)
    assert after.count("sources `abc`") == after.count("sources `def`") == 1
    assert after.index("sources `abc`") < after.index("## Another") < after.index("sources `def`")
    assert NOT_RUN.capitalize() not in after
    assert after.endswith(f"{BY_HAND}\n\n## By hand\n")
    assert page(both, "def", after) == after


def test_curves_are_drawn_below_the_table(trace, tmp_path):
    found = outcome(Runs(trace, tmp_path / "kept"), RUN)
    drawn = replace(TOY, curves=lambda o: {"load": np.array([0.0, 5.0])})
    text = page([Findings(drawn, (RUN, RUN), (found, None))], "abc", "")
    assert "```\nsmall  load   █  0 to 5\n```" in text


def test_what_is_written_by_hand_stays(trace, tmp_path):
    place = tmp_path / "page.md"
    place.write_text(f"# Old figures\n\n{BY_HAND}\n\n## By hand\n")
    arguments = ["--trace", str(trace), "--keep", str(tmp_path / "kept"), "--page", str(place)]
    assert main([*arguments, "--only", "none"]) == 0
    text = place.read_text()
    assert "Old figures" not in text
    assert text.endswith(f"{BY_HAND}\n\n## By hand\n")
    assert text.count(NOT_RUN.capitalize()) == len(EXPERIMENTS)
    assert main([*arguments, "--only", "none"]) == 0
    assert place.read_text() == text


def test_an_unknown_experiment_is_named(trace, tmp_path):
    with pytest.raises(SystemExit, match="no experiment 'nothing'"):
        main(["--trace", str(trace), "--keep", str(tmp_path / "k"), "--only", "nothing"])


def test_every_experiment_has_different_rows_and_published_figures_of_its_columns():
    for experiment in EXPERIMENTS:
        if isinstance(experiment, Search):
            continue
        wanted = experiment.runs(experiment.quick)
        assert len(set(wanted)) == len(wanted)
        headings = {column.heading for column in experiment.columns}
        assert {name for row in experiment.rows for name in row.published} <= headings


def test_effective_requests_meet_both_limits(trace, tmp_path):
    found = outcome(Runs(trace, tmp_path / "kept"), RUN)
    assert effective(found, 10.0) == 100
    assert effective(found, 0.0) == 0
    assert effective(found, 10.0, ttft_s=0.0) == 0


@pytest.mark.parametrize(("store_blocks", "hits"), [(0, 0), (1, 4)])
def test_the_caches_of_a_fleet_are_compared_with_one_of_their_size(store_blocks, hits):
    """Three blocks in the GPUs; third blocks are not full, and not counted."""
    asked = [(1, 2, 3), (4, 5, 6), (1, 2, 9), (4, 5, 6)]
    requests = [Request(float(n), 1100, 1, blocks) for n, blocks in enumerate(asked)]
    spec = FleetSpec("1P+1D", kv_blocks=3, store_blocks=store_blocks)
    found = Outcome(Run(spec, CACHES.quick), Result({}, {}), requests, cpu_s=0.0, wall_s=0.0)
    one_lru = next(column for column in CACHES.columns if column.heading == "one LRU cache")
    assert one_lru.of(found) == pytest.approx(100 * hits * 512 / 4400)
