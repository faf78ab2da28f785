"""Results of the simulator: tables, files that are equal byte for byte, and totals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from baton.errors import ConfigError
from sim.fleet.records import Event, LinkSample, Record, Table, WorkerSample, table_of
from sim.fleet.result import Result, encode, read_result, write_result
from sim.fleet.totals import good, totals

FAST = Record(
    index=0,
    at_s=1.0,
    code="ok",
    ttft_s=0.5,
    end_s=3.0,
    prompt_tokens=100,
    output_tokens=11,
    cached_tokens=50,
    tbt_mean_s=0.1,
    tbt_p50_s=0.1,
    tbt_p90_s=0.15,
    tbt_p99_s=0.9,
    tbt_worst_s=0.25,
    tbt_max_s=1 / 3,
    prefill="p0",
    decode="d1",
    predicted_ttft_s=0.4,
    queue_s=0.5,
    fetch_s=0.1,
    prefill_s=0.3,
)
GAPS = ("tbt_mean_s", "tbt_p50_s", "tbt_p90_s", "tbt_p99_s", "tbt_worst_s", "tbt_max_s")
SINGLE = replace(FAST, index=1, at_s=2.0, **dict.fromkeys(GAPS))  # type: ignore[arg-type]
REFUSED = replace(SINGLE, index=2, code="overloaded", ttft_s=None, prefill="", end_s=2.0)
SLOW = replace(FAST, index=3, at_s=4.0, ttft_s=5.0, end_s=11.0)
RECORDS = [FAST, SINGLE, REFUSED, SLOW]


def result(records: list[Record]) -> Result:
    return Result(
        {"cluster": "1P+1D", "slo_ttft_s": 1.0},
        {"requests": len(records)},
        {},
        table_of(Record, records),
        table_of(WorkerSample, [WorkerSample(1.0, "p0", "prefill", 1, 2, 0.25, 0.5, 0.0)]),
        table_of(LinkSample, [LinkSample(1.0, "nic out of p0", 1 << 40)]),
        table_of(Event, [Event(2.0, "d1 now computes prompts")]),
    )


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_result(result(RECORDS), path)
    back = read_result(path)
    assert encode(back) == encode(result(RECORDS))
    assert back.spec == {"cluster": "1P+1D", "slo_ttft_s": 1.0}
    assert back.records.texts("code") == ["ok", "overloaded"]
    assert back.records.where("code", "overloaded").tolist() == [False, False, True, False]
    assert not back.records.where("code", "elsewhere").any()
    assert np.isnan(back.records.column("ttft_s")).tolist() == [False, False, True, False]
    assert back.links.column("bytes").tolist() == [1 << 40]
    assert back.events.texts("text") == ["d1 now computes prompts"]


def test_equal_results_have_equal_bytes(tmp_path: Path) -> None:
    assert encode(result(RECORDS)) == encode(result(list(RECORDS)))
    for name in ("a.json.gz", "b.json.gz"):
        write_result(result(RECORDS), tmp_path / name)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    body = json.loads(encode(result(RECORDS)))
    assert body["records"]["tbt_max_s"] == [0.333333, None, None, 0.333333]
    assert body["records"]["prefill"] == {"texts": ["p0", ""], "of": [0, 0, 1, 0]}


def test_an_empty_result_can_be_written(tmp_path: Path) -> None:
    write_result(Result({}, {}), tmp_path / "empty.json")
    assert len(read_result(tmp_path / "empty.json").records) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no result"),
        ("[]", "not a result"),
        ('{"format": "baton-sim", "version": 99}', "version 99"),
        ('{"format": "baton-sim", "version": 1}', "no result"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"a\.json.*{says}"):
        read_result(path)
    with pytest.raises(ConfigError, match="nowhere"):
        read_result(tmp_path / "nowhere")


def test_tables_that_do_not_fit_are_refused() -> None:
    body = json.loads(encode(result(RECORDS)))["events"]
    with pytest.raises(ConfigError, match="Event columns of different lengths"):
        Table.from_json(Event, body | {"at_s": [1.0, 2.0]})
    with pytest.raises(ConfigError, match="Event rows without text"):
        Table.from_json(Event, {"at_s": []})


def test_a_request_is_good_within_both_slos() -> None:
    records = table_of(Record, RECORDS)
    assert good(records, 1.0, 0.2).tolist() == [True, True, False, False]
    assert good(records, 1.0, 0.1).tolist() == [False, True, False, False]
    assert good(records, 10.0, 0.2).tolist() == [True, True, False, True]


def test_totals_are_of_the_answered_requests() -> None:
    run = result(RECORDS)
    found = totals(run.records, run.workers, 1.0, 0.2)
    assert found["codes"] == {"ok": 3, "overloaded": 1}
    assert (found["requests"], found["good"], found["good_share"]) == (4, 2, 0.5)
    assert (found["duration_s"], found["goodput_per_s"]) == (10.0, 0.2)
    assert (found["prompt_tokens"], found["cached_share"]) == (300, 0.5)
    assert found["ttft_s"]["p50"] == 0.5
    assert found["ttft_s"]["max"] == 5.0
    assert found["tbt_p90_s"] == {"mean": 0.15, "p50": 0.15, "p90": 0.15, "p99": 0.15, "max": 0.15}
    assert (found["prefill_busy_s"], found["decode_busy_s"]) == (0.5, 0.0)
    empty = totals(Table(Record), Table(WorkerSample), 1.0, 0.2)
    assert empty["ttft_s"]["mean"] is None
    assert empty["goodput_per_s"] == 0.0
