"""Workers that change their role in the simulator, as the production planner wants."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest

from baton.errors import ConfigError
from sim.fleet.records import OK
from sim.fleet.result import Result, encode
from sim.fleet.run import simulate
from sim.fleet.spec import FleetSpec
from sim.workload.trace import Request

LONG_PROMPTS = [Request(1.0 * n, 20_480, 65, tuple(range(40 * n, 40 * n + 40))) for n in range(30)]


def run(spec: FleetSpec) -> Result:
    return simulate(spec, iter(LONG_PROMPTS), {})


@pytest.fixture(scope="module")
def elastic() -> Result:
    return run(FleetSpec("1P+2D", grain=64, elastic=True))


def test_a_worker_goes_where_the_work_is_and_everybody_is_answered(elastic: Result) -> None:
    events = elastic.events.texts("text")
    assert [text.split(":")[0] for text in events] == [
        "d0 is to prefill",
        "d0 is a prefill worker now",
    ]
    assert "2P1D lowers the pressure" in events[0]
    assert elastic.totals["codes"] == {OK: len(LONG_PROMPTS)}
    assert set(elastic.records.texts("prefill")) == {"p0", "d0"}
    decoded, at_s = elastic.records.column("decode"), elastic.records.column("at_s")
    late = at_s > elastic.events.column("at_s")[0]
    assert {elastic.records.texts("decode")[n] for n in decoded[late]} == {"d1"}


def test_answers_move_on_when_their_worker_takes_another_role() -> None:
    """Which waits for the prompts in line for it, but not for answers of minutes."""
    long_answers = [replace(request, output_tokens=8193) for request in LONG_PROMPTS]
    result = simulate(FleetSpec("1P+2D", grain=64, elastic=True), iter(long_answers), {})
    asked_at, taken_at = result.events.column("at_s")[:2]
    records = result.records
    decoding = (records.column("at_s") < asked_at) & (records.column("end_s") > taken_at)
    assert taken_at - asked_at < 20.0
    assert any(decoding)
    assert result.totals["codes"] == {OK: len(LONG_PROMPTS)}
    assert set(records.column("output_tokens")) == {8193}


def test_samples_tell_the_role_that_a_worker_has(elastic: Result) -> None:
    workers = elastic.workers
    roles = {
        workers.texts("role")[n] for n in workers.column("role")[workers.where("worker", "d0")]
    }
    assert roles == {"decode", "prefill"}


def test_equal_runs_give_equal_bytes(elastic: Result) -> None:
    assert encode(run(FleetSpec("1P+2D", grain=64, elastic=True))) == encode(elastic)


def test_without_it_roles_stay() -> None:
    assert not len(run(FleetSpec("1P+2D", grain=64)).events)


def test_the_spec_says_so() -> None:
    spec = FleetSpec("1P+2D", elastic=True)
    assert FleetSpec.from_json(orjson.loads(orjson.dumps(spec.as_json()))) == spec
    for cluster in ("1P+1D", "3M", "3D"):
        with pytest.raises(ConfigError, match="cannot be elastic"):
            FleetSpec(cluster, elastic=True)
