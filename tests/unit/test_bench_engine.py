"""`baton bench engine`: timing, ceilings, models, the whole run on a tiny one, and its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from baton.bench import engine, engine_text, engine_time
from baton.bench.engine_ceilings import Bound, Ceilings
from baton.bench.engine_cost import Chunk, Work
from baton.bench.engine_device import find_device
from baton.bench.engine_loop import LoopTiming, measure_loop
from baton.bench.engine_models import SHAPES, shape_named, write_random_model
from baton.bench.engine_options import Options
from baton.bench.engine_phases import (
    Measured,
    Plan,
    Skipped,
    measure_decodes,
    measure_prefills,
)
from baton.bench.engine_rate import Rate
from baton.bench.engine_read import read_all
from baton.bench.engine_rig import Rig, find_model, open_rig
from baton.bench.engine_time import Timing, measure
from baton.cli import main
from baton.engine.cuda_runner import CudaRunner
from baton.engine.graph_backend import HostBackend
from baton.errors import ConfigError
from baton.kernels.dispatch import kernels_for
from baton.kv.transport.memory import make_pool
from baton.model.spec import load_spec
from baton.model.weights import load_weights
from sim.costs.calibrate import calibrated

TIMING = Timing(median_s=2.0, best_s=1.5, spread=0.1, samples=5)


def ceilings(matrix: float = 100.0, read: float = 10.0, copy: float = 8.0) -> Ceilings:
    return Ceilings(
        (Rate("slow", 1.0), Rate("fast", matrix), Rate("in a cache", 1e9, counts=False)),
        (Rate("read small", 2 * read, 100), Rate("read large", read, 1000)),
        (Rate("copy", copy, 1000),),
    )


def report(**parts: object) -> engine.Report:
    found: dict[str, object] = {
        "options": Options(shape="tiny"),
        "model": "tiny",
        "device": "a machine",
        "dtype": "bfloat16",
        "weight_bytes": 1,
        "kv_token_bytes": 1,
        "before": ceilings(),
        "after": ceilings(),
    }
    return engine.Report(**(found | parts))  # type: ignore[arg-type]


# -- time -------------------------------------------------------------------------------------


class Clock:
    """A clock that calls move."""

    def __init__(self) -> None:
        self.now = 0.0

    def call(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


def timed(clock: Clock, seconds: Iterator[float], budget_s: float) -> Timing:
    return measure(lambda: clock.call(seconds), budget_s, clock=lambda: clock.now)


def test_a_median_of_many_calls_without_the_cold_first_one() -> None:
    clock = Clock()
    found = timed(clock, iter([3.0, *[1.0] * 1000]), budget_s=10.0)
    assert (found.median_s, found.best_s, found.spread, found.samples) == (1.0, 1.0, 0.0, 10)
    assert clock.now == 3.0 + 1.0 + 10.0


def test_a_call_far_above_the_budget_is_made_once() -> None:
    assert timed(Clock(), iter([9.0]), budget_s=1.0) == Timing(9.0, 9.0, 0.0, 1)


def test_short_calls_are_repeated_within_a_sample() -> None:
    found = timed(Clock(), iter([1e-5] * 100_000), budget_s=0.01)
    assert found.samples == 5
    assert found.median_s == pytest.approx(1e-5)


def test_the_spread_is_between_the_quartiles() -> None:
    assert engine_time.summarize([1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(2 / 3)
    assert TIMING.of_one(4) == Timing(0.5, 0.375, 0.1, 5)


# -- ceilings ---------------------------------------------------------------------------------


def test_the_ceiling_that_binds_is_the_slower_one() -> None:
    machine = ceilings()
    assert machine.bound(Work(flops=1000, read=10)) == Bound(10.0, "matrix")
    assert machine.bound(Work(flops=100, read=2000)) == Bound(200.0, "memory")


def test_small_working_sets_are_compared_with_what_reads_them_faster() -> None:
    machine = ceilings()
    assert [machine.read_per_s(size) for size in (1, 100, 999, 1000)] == [20.0, 20.0, 20.0, 10.0]


def test_what_is_written_moves_at_the_rate_of_a_copy() -> None:
    assert ceilings().memory_s(Work(read=2000, written=400)) == 2 * 400 / 8.0 + 1600 / 10.0


def test_moved_ceilings_are_a_warning_and_the_better_ones_count() -> None:
    found = report(after=ceilings(matrix=105.0, read=13.0))
    assert len(found.warnings) == 1
    assert "reading moved by +30%" in found.warnings[0]
    assert found.ceilings.matrix_per_s == 105.0
    assert found.ceilings.read_per_s(1000) == 13.0
    assert report().warnings == ()


@pytest.mark.parametrize("count", [1, 8192, 3 * 8192 * 2 + 5])
def test_the_reading_kernel_reads_everything(count: int) -> None:
    pytest.importorskip("triton")
    words = torch.ones(count, device="cuda" if torch.cuda.is_available() else "cpu")
    assert float(read_all(words, programs=3).sum()) == count


def test_the_reading_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    """In a process of its own: one that interprets Triton kernels cannot compile them."""
    pytest.importorskip("triton")
    script = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from baton.bench.engine_read import _read
types = {"words": "*fp32", "sums": "*fp32", "count": "i64", "chunks": "i32", "chunk": "constexpr"}
source = ASTSource(_read, types, constexprs={(4,): 8192}, attrs={(0,): [["tt.divisibility", 16]]})
target = GPUTarget("cuda", 90, 32)
assert triton.compile(source, target=target, options={"num_warps": 8}).asm["cubin"]
"""
    environ = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environ)


# -- models -----------------------------------------------------------------------------------


def test_random_models_load_and_are_the_same_every_time(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
        write_random_model(SHAPES["tiny"], directory)
    spec = load_spec(one)
    assert spec.fingerprint == load_spec(two).fingerprint
    weights = load_weights(spec, one, "float32", "cpu")
    assert weights.norm.tolist() == [1.0] * 128
    assert weights.embedding.std().item() == pytest.approx(0.02, rel=0.05)
    rows = weights.layers[1].gate_up
    assert len(rows.unique(dim=0)) == len(rows)


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ConfigError, match="small"):
        shape_named("huge")


# -- the whole run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> engine.Report:
    parts = ("prefill", "decode", "mixed", "loop", "profile")
    options = Options(shape="tiny", device="cpu", threads=1, quick=True, parts=parts)
    return engine.run(options, lambda name: None)


def test_every_part_is_measured(measured: engine.Report) -> None:
    assert [figure.name for figure in measured.prefills] == ["prefill 64", "prefill 512"]
    assert [figure.name for figure in measured.decodes] == ["decode 1 x 64", "decode 4 x 256"]
    assert [figure.name for figure in measured.mixed] == ["mixed 4 x 64 and 64 after 64"]
    assert all(
        isinstance(f, Measured) for f in (*measured.prefills, *measured.decodes, *measured.mixed)
    )
    assert [loop.sequences for loop in measured.loops][:2] == [1, 8]
    assert all(0 <= loop.gap_s < loop.step_s for loop in measured.loops)
    assert all(profile.lines for profile in measured.profiles)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_kernels_alone(kernels: str) -> None:
    options = Options(
        shape="tiny", device="cpu", threads=1, kernels=kernels, quick=True, parts=("kernels",)
    )
    found = engine.run(options, lambda name: None).kernels
    names = [figure.name for figure in found]
    assert len(set(names)) == len(names)
    assert all(isinstance(figure, Measured) for figure in found)
    for wanted in ("attention", "qkv", "down"):
        assert any(wanted in name for name in names)


def test_the_simulator_reads_the_report(measured: engine.Report, tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(engine_text.as_json(measured)))
    found = calibrated(f"calibrated:{path}")
    names = [*measured.prefills, *measured.decodes, *measured.mixed]
    assert [name for name, _ in found.errors] == [figure.name for figure in names]
    assert found.kv_bytes_per_token == measured.kv_token_bytes


def test_the_report_is_json_and_tables(measured: engine.Report) -> None:
    value = json.loads(json.dumps(engine_text.as_json(measured)))
    assert value["decode"][0]["tokens"] == 1
    assert value["decode"][0]["memory_share"] > 0
    assert value["mixed"][0]["tokens"] == 68
    titles = [table.title for table in engine_text.tables(measured)]
    assert titles[1:4] == ["Prefill", "Decode", "Decodes with a chunk of a prompt"]
    assert titles[4] == "Between the steps of an engine"
    for table in engine_text.tables(measured):
        assert all(len(row) == len(table.header) for row in table.rows)


def test_points_that_cannot_be_measured_say_why(tmp_path: Path) -> None:
    device = find_device("cpu", 1)
    model = find_model(write_random_model(SHAPES["tiny"], tmp_path), device, "bfloat16", 32)
    decodes = ((1, 32), (1, 1 << 20), (4, 64), (2, 32))
    plan = Plan((), decodes, 512, budget_s=0.01, limit_s=10.0, kv_bytes=3 << 14)
    assert plan.blocks(model) == 2
    with open_rig(model, device, plan.blocks(model)) as rig:
        first, long, wide, last = measure_decodes(rig, plan, ceilings(1e9, 1e9, 1e9), str)
        slow = measure_decodes(rig, plan, ceilings(1e3, 1e9, 1e9), str)[0]
        with pytest.raises(ConfigError, match="2 blocks"):
            rig.batch([Chunk(64, 1)])
    assert isinstance(first, Measured)
    assert isinstance(last, Measured)
    assert long == Skipped("decode 1 x 1048576", "the model's contexts have at most 40960 tokens")
    assert isinstance(wide, Skipped)
    assert "room" in wide.reason
    assert isinstance(slow, Skipped)
    assert "at the ceiling" in slow.reason


def test_a_runner_that_queues_its_steps_is_measured_too(tmp_path: Path) -> None:
    """The one for GPUs, over a queue on the CPU that is always empty."""
    device = find_device("cpu", 1)
    model = find_model(write_random_model(SHAPES["tiny"], tmp_path), device, "float32", 32)
    memory = make_pool(16 * model.layout.block_bytes, "cpu")
    arguments = (model.spec, tmp_path, model.layout, memory, 16, 1, kernels_for("cpu"))
    runner = CudaRunner(*arguments, HostBackend(), buckets=(1, 4))
    runner.warm_up()
    rig = Rig(model, runner, memory, 16, tuple(range(16)))
    plan = Plan((64,), ((3, 32),), 32, budget_s=0.01, limit_s=10.0, kv_bytes=memory.nbytes)
    assert isinstance(measure_prefills(rig, plan, ceilings(1e15, 1e15, 1e15), str)[0], Measured)
    assert isinstance(measure_decodes(rig, plan, ceilings(1e15, 1e15, 1e15), str)[0], Measured)
    (loop,) = measure_loop(rig, (3, 500), 8, str)
    assert (loop.sequences, loop.steps) == (3, 6)
    assert 0 <= loop.gap_s < loop.step_s
    runner.close()


# -- the report -------------------------------------------------------------------------------


def test_shares_are_of_the_ceilings() -> None:
    decode = Measured("decode 4 x 10", 4, TIMING, Work(flops=20, read=2000))
    value = engine_text.as_json(report(decodes=(decode,)))["decode"][0]
    assert value["tokens_per_s"] == 2.0
    assert value["bound_by"] == "memory"
    assert value["share"] == value["memory_share"] == 100.0
    prefill = Measured("prefill 7", 7, TIMING, Work(flops=160, read=1))
    table = list(engine_text.tables(report(prefills=(prefill,))))[1]
    assert table.rows == (("prefill 7", "2 s", "10.0%", "4", "8e-08 GFLOP/s", "80.0%"),)


def test_skipped_points_stand_with_their_reason() -> None:
    skipped = Skipped("decode 256 x 32768", "no room")
    found = report(decodes=(skipped,), loops=(LoopTiming(8, 30, 2e-3, 1e-5),))
    assert engine_text.as_json(found)["decode"] == [
        {"name": "decode 256 x 32768", "skipped": "no room"}
    ]
    text = "\n".join(engine_text.markdown(table) for table in engine_text.tables(found))
    assert "skipped: no room" in text
    assert "| 8 | 2 ms | 10 µs | 0.5% |" in text


# -- the command ------------------------------------------------------------------------------


def test_the_command_writes_json(tmp_path: Path) -> None:
    target = tmp_path / "engine.json"
    arguments = ["bench", "engine", "--shape", "tiny", "--device", "cpu", "--threads", "1"]
    arguments += ["--quick", "--only", "decode", "--json", str(target)]
    done = CliRunner().invoke(main.app, arguments)
    assert done.exit_code == 0, done.output
    assert "decode 4 x 256" in done.output
    value = json.loads(target.read_text())
    assert value["benchmark"] == "engine"
    assert value["command"].startswith("baton")


def test_the_points_can_be_chosen(tmp_path: Path) -> None:
    target = tmp_path / "engine.json"
    arguments = ["bench", "engine", "--shape", "tiny", "--device", "cpu", "--threads", "1"]
    arguments += ["--quick", "--only", "prefill,decode", "--json", str(target)]
    done = CliRunner().invoke(main.app, [*arguments, "--prompts", "48", "--decodes", "2x40,3x20"])
    assert done.exit_code == 0, done.output
    value = json.loads(target.read_text())
    names = [figure["name"] for figure in (*value["prefill"], *value["decode"])]
    assert names == ["prefill 48", "decode 2 x 40", "decode 3 x 20"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "encode"], "'encode'"),
        (["--shape", "huge"], "'huge'"),
        (["--device", "tpu"], "'tpu'"),
        ([".", "--shape", "tiny"], "not both"),
        (["--prompts", "64,many"], "'many'"),
        (["--decodes", "8"], "--decodes takes NxN by commas, not '8'"),
        (["--decodes", "8x0"], "'8x0'"),
    ],
)
def test_wrong_options_are_one_clear_error(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main.app, ["bench", "engine", "--quick", *arguments])
    assert isinstance(done.exception, ConfigError)
    assert message in done.exception.message
