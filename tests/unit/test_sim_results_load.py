"""What experiments draw: loads over time from records, and curves as text."""

import math
from dataclasses import fields

import numpy as np
import pytest

from sim.fleet.records import OK, Record, table_of
from sim.results.load import Loads, loads, variation
from sim.results.sparkline import sparklines


def record(at_s: float, ttft_s: float | None, end_s: float, code: str = OK) -> Record:
    blank = dict.fromkeys(field.name for field in fields(Record))
    texts = {"prefill": "p0", "decode": "d0"}
    numbers = {"index": 0, "prompt_tokens": 1000, "output_tokens": 10, "cached_tokens": 0}
    times = {"at_s": at_s, "ttft_s": ttft_s, "end_s": end_s}
    return Record(**{**blank, **texts, **numbers, **times, "code": code})


def test_loads_count_who_waits_for_the_first_token_and_who_decodes():
    rows = [
        record(0.0, 1.5, 4.0),  # prefill until 1.5, decode until 4
        record(1.0, 2.0, 9.0),
        record(1.5, None, 1.5, "overloaded"),  # was never let in
        record(5.0, 0.5, 6.0),
    ]
    found = loads(table_of(Record, rows))
    assert found.prefill.tolist() == [1, 2, 1, 0, 0]  # at 0 to 4 s
    assert found.decode.tolist() == [0, 0, 1, 2, 1]


def test_loads_in_anti_phase_are_told_from_loads_that_rise_together():
    times = np.arange(400.0)
    wave = 10 + 5 * np.sin(times / 9)
    assert Loads(wave, 20 - wave).settled.correlation == pytest.approx(-1)
    assert Loads(wave, 2 * wave).settled.correlation == pytest.approx(1)
    assert math.isnan(Loads(wave, np.ones(400)).correlation)
    assert variation(wave) == pytest.approx(5 / math.sqrt(2) / 10, rel=0.02)
    assert variation(np.ones(400)) == 0
    assert math.isnan(variation(np.zeros(400)))


def test_what_comes_before_the_cluster_has_filled_does_not_count():
    rising = np.array([0.0, 0.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0])
    assert variation(Loads(rising, rising).settled.prefill) == 0


def test_every_curve_has_its_own_scale():
    drawn = sparklines(
        {
            "low": {"prefill": np.array([0.0, 4.0]), "decode": np.array([1.0, 0.0])},
            "high": {"prefill": np.array([8.0, 2.0]), "decode": np.array([0.0, 0.0])},
        }
    )
    assert drawn.splitlines() == [
        "low   prefill   █  0 to 4",
        "low   decode   █   0 to 1",
        "high  prefill  █▂  0 to 8",
        "high  decode       0 to 0",
    ]


def test_a_character_is_the_mean_of_its_part_of_the_time():
    (line,) = sparklines({"a": {"b": np.array([1.0, 3.0] * 72)}}).splitlines()
    assert line == f"a  b  {'█' * 72}  0 to 2"
