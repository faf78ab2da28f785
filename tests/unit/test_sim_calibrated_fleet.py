"""A simulated cluster whose workers are as fast as a machine that was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.errors import ConfigError
from sim.costs.calibrate import calibrated
from sim.costs.compute import Prefill
from sim.fleet.run import simulate
from sim.fleet.spec import Cache, FleetSpec
from sim.workload.trace import Request

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NODE = f"calibrated:{RESULTS / 'engine-qwen3-0.6b.json'}"


def test_a_request_alone_takes_what_the_machine_takes() -> None:
    spec = FleetSpec(
        "1P+1D", "qwen3-0.6b", NODE, network_gbps=40, grain=1, kv_blocks=16, cache=Cache.NONE
    )
    result = simulate(spec, iter([Request(0.0, 1024, 17, (1, 2))]), {})
    cost = calibrated(NODE).cost
    [ttft], [tbt] = result.records.column("ttft_s"), result.records.column("tbt_p50_s")
    assert ttft == pytest.approx(cost.seconds([Prefill(1024)], []), rel=0.03)
    assert tbt == pytest.approx(cost.seconds([], [1032]), rel=0.03)


@pytest.mark.parametrize(
    ("model", "kv_blocks", "wrong"),
    [("llama3-70b", 16, "not of llama3-70b"), ("qwen3-0.6b", 0, "needs --kv-blocks")],
)
def test_another_model_and_unknown_memory_are_errors(
    model: str, kv_blocks: int, wrong: str
) -> None:
    spec = FleetSpec("1P+1D", model, NODE, network_gbps=40, kv_blocks=kv_blocks)
    with pytest.raises(ConfigError, match=wrong):
        simulate(spec, iter(()), {})
