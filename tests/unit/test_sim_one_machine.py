"""A cluster on the cores of one machine, as a calibration file says what it takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ConfigError
from sim.costs.calibrate import calibrated
from sim.costs.compute import Prefill
from sim.costs.cores import Kind
from sim.costs.serving import Overheads, serving_of
from sim.fleet.run import simulate
from sim.fleet.spec import FleetSpec
from sim.workload.trace import Request
from tests.unit.calibration_kit import ENGINE, OVERHEADS


def calibration(path: Path, **changes: Any) -> str:
    """A file of a machine that takes exactly this long."""
    prompts = {f"prefill {n}": ENGINE.seconds([Prefill(n)], []) for n in (128, 512)}
    sizes = [(n, c) for n in (1, 8) for c in (128, 1024)]
    decodes = {f"decode {n} x {c}": ENGINE.seconds([], [c] * n) for n, c in sizes}

    def figures(seconds: dict[str, float]) -> list[dict[str, Any]]:
        return [{"name": name, "median_s": median} for name, median in seconds.items()]

    overheads = asdict(OVERHEADS) | {"lend_s": 0.0}  # which nobody waits for
    serving = {"cores": 2, "overheads": overheads, "beside": {"prefill": {"decode": 1.2}}}
    found = {
        "model": "small",
        "device": "two cores",
        "kv_token_bytes": 4096,
        "options": {"step_tokens": 2048},
        "prefill": figures(prompts),
        "decode": figures(decodes),
        "serving": serving | changes,
    }
    path.write_text(json.dumps(found))
    return f"calibrated:{path}"


def spec(node: str, cluster: str = "1P+1D") -> FleetSpec:
    return FleetSpec(cluster, "small", node, grain=1, kv_blocks=64, max_model_len=4096)


def test_a_request_alone_takes_what_engine_and_overheads_take(tmp_path: Path) -> None:
    node = calibration(tmp_path / "a.json")
    result = simulate(spec(node), iter([Request(0.0, 512, 9, (1,))]), {})
    [ttft], [mean] = result.records.column("ttft_s"), result.records.column("tbt_mean_s")
    prefill = ENGINE.seconds([Prefill(512)], []) + 0.003 + 512e-5
    assert ttft == pytest.approx(0.002 + 512e-6 + 0.001 + prefill + 7e-4, rel=1e-6)
    steps = sum(ENGINE.seconds([], [512 + n]) + 0.0013 for n in range(1, 9))
    assert mean == pytest.approx((0.004 + 0.001 + 0.002 + steps) / 8, rel=1e-3)


def test_with_more_workers_than_cores_steps_share_them(tmp_path: Path) -> None:
    """The second prompt is computed by the worker on the other core, on which nothing else is."""
    node = calibration(tmp_path / "a.json")
    requests = [Request(0.0, 512, 200, (1,)), Request(0.5, 512, 2, (2,))]
    alone = simulate(spec(node, "2P+2D"), iter(requests[:1]), {}).records.column("tbt_max_s")
    both = simulate(spec(node, "2P+2D"), iter(requests), {})
    assert both.records.column("tbt_max_s").max() > alone.max()
    assert simulate(spec(node, "2P+2D"), iter(requests), {}).totals == both.totals


def test_with_links_every_worker_has_a_machine_of_its_own(tmp_path: Path) -> None:
    node = calibration(tmp_path / "a.json")
    many = FleetSpec("1P+1D", "small", node, network_gbps=100, grain=1, kv_blocks=64)
    result = simulate(many, iter([Request(0.0, 512, 9, (1,))]), {})
    [ttft] = result.records.column("ttft_s")
    assert ttft == pytest.approx(ENGINE.seconds([Prefill(512)], []), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"overheads": {"sleep_s": 1.0}}, "knows no sleep_s"),
        ({"cores": "many"}, "is broken"),
        ({"beside": {"prefill": {"knitting": 1.0}}}, "is broken"),
    ],
)
def test_a_broken_part_is_an_error(tmp_path: Path, changes: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        calibrated(calibration(tmp_path / "a.json", **changes))


def test_what_is_not_said_takes_no_time() -> None:
    found = serving_of({"cores": 2, "overheads": {}, "beside": {"decode": {"prefill": 1.5}}})
    assert found.overheads == Overheads()
    assert found.beside == {(Kind.DECODE, Kind.PREFILL): 1.5}
