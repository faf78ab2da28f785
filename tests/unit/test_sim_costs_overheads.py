"""What another engine adds to a step."""

from __future__ import annotations

import pytest

from baton.errors import ConfigError
from sim.costs.compute import Prefill, Roofline
from sim.costs.machines import MACHINES
from sim.costs.models import MODELS
from sim.costs.overheads import OVERHEADS, Overhead, WithOverhead
from sim.fleet.hardware import Hardware
from sim.fleet.spec import FleetSpec

PLAIN = Roofline(MODELS["llama3-70b"], MACHINES["8xA800"], 8)
COST = WithOverhead(PLAIN, Overhead(sequence_s=1e-3, eager_step_s=0.05, graph_tokens=8192))


def test_every_sequence_of_a_step_adds_its_share() -> None:
    contexts = [100, 8192]
    assert COST.seconds((), contexts) == pytest.approx(PLAIN.seconds((), contexts) + 2e-3)
    prompts = [Prefill(8192), Prefill(100, 50)]
    assert COST.seconds(prompts, [7]) == pytest.approx(PLAIN.seconds(prompts, [7]) + 3e-3)


def test_a_step_that_is_no_graph_takes_its_launches_at_least() -> None:
    assert COST.seconds((), [8193]) == pytest.approx(0.05 + 1e-3)
    assert COST.seconds([Prefill(1)], ()) == pytest.approx(0.05 + 1e-3)
    assert COST.seconds((), [8192]) < 0.05


def test_an_empty_step_takes_nothing() -> None:
    assert COST.seconds((), ()) == 0


def test_a_fleet_has_the_overhead_that_it_asks_for() -> None:
    contexts = [100] * 32
    plain = Hardware(FleetSpec("16M")).cost.seconds((), contexts)
    assert plain == PLAIN.seconds((), contexts)
    told = Hardware(FleetSpec("16M", overheads="vllm-0.5")).cost.seconds((), contexts)
    overhead = OVERHEADS["vllm-0.5"]
    assert overhead is not None
    assert told == pytest.approx(plain + 32 * overhead.sequence_s)
    with pytest.raises(ConfigError, match=r"vllm-0\.5"):
        FleetSpec("16M", overheads="vllm")
