"""Tables of results: medians over rounds, ratios within rounds, noise left out."""

from __future__ import annotations

from typing import Any

import pytest

from bench.report import (
    Column,
    Spread,
    as_markdown,
    as_text,
    cell,
    document,
    spread_of,
    tables,
    without_noise,
)


def run(system: str, round_: int, rate: float, failed: int = 0, noise: float = 0.0) -> Any:
    return {
        "model": "small",
        "workload": "batch16",
        "system": system,
        "round": round_,
        "figures": {"output_tokens_per_s": rate, "failed": failed, "others_cpu_share": noise},
        "errors": [["HTTP 500: no\nmore", failed]] if failed else [],
    }


RUNS = [
    *(run("vllm", i, rate) for i, rate in enumerate((100.0, 50.0, 80.0))),
    *(run("baton", i, rate) for i, rate in enumerate((150.0, 100.0, 160.0))),
]
RESULT: dict[str, Any] = {
    "reference": "vllm",
    "rounds": 3,
    "noise_limit": None,
    "setting": {"quick": False},
    "command": "python -m bench",
    "revision": "abc",
    "time": "now",
    "machine": {
        "processor": "P",
        "cpus": [0, 1],
        "cpus_of_machine": 2,
        "flags": ["avx2"],
        "memory_gib": 8,
        "gpus": [],
    },
    "workloads": {"batch16": "sixteen", "stream": "one"},
    "systems": {
        "small": {
            "baton": {"ready_s": 4.0, "memory_bytes": 2**30, "idle_cpu_share": 0.01},
            "vllm": {"ready_s": 60.0, "memory_bytes": 2**31, "idle_cpu_share": 0.1},
            "other": {"failed": "no such program\nlog"},
        }
    },
    "runs": RUNS,
}


def test_ratios_are_taken_within_rounds() -> None:
    own, reference = RUNS[3:], RUNS[:3]
    spread = spread_of(own, "output_tokens_per_s", reference)
    assert spread == Spread(150.0, 100.0, 160.0, 3, 2.0)
    assert spread_of(own, "ttft_p50_s", reference) is None


def test_failed_rounds_have_no_figures() -> None:
    spread = spread_of([run("a", 0, 5.0), run("a", 1, 1.0, failed=1)], "output_tokens_per_s", [])
    assert spread == Spread(5.0, 5.0, 5.0, 1, None)


def test_a_noisy_round_is_left_out_for_all() -> None:
    runs = [*RUNS, run("vllm", 3, 10.0), run("baton", 3, 5.0, noise=0.4)]
    assert without_noise(runs, 0.1) == (RUNS, 1)
    assert without_noise(runs, None) == (runs, 0)
    noisy = [run("vllm", 0, 10.0, noise=0.4)]
    assert without_noise(noisy, 0.1) == (noisy, 0)


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (None, "-"),
        (Spread(0.0123, 0.01, 0.02, 3, 0.5), "12.3 [10.0–20.0] (0.50×)"),
        (Spread(0.0123, 0.0123, 0.0123, 1, None), "12.3"),
    ],
)
def test_cells(spread: Spread | None, text: str) -> None:
    assert cell(spread, Column("x", "x ms", 1e3, spread=True, ratio=True)) == text


def test_tables_are_in_the_order_of_the_plan_and_say_what_failed() -> None:
    load, cost = tables(RESULT)
    assert [row[0] for row in load.rows] == ["baton", "vllm"]
    assert load.rows[0][1] == "150 [100–160] (2.00×)"
    assert load.rows[1][1] == "80 [50–100]"
    assert cost.notes == ("other: no such program",)
    assert [row[0] for row in cost.rows] == ["baton", "vllm"]


def test_errors_are_listed_once() -> None:
    result = {**RESULT, "runs": [*RUNS, run("baton", 3, 0.0, 2), run("baton", 4, 0.0, 3)]}
    assert tables(result)[0].notes == ("baton: 5 × HTTP 500: no",)
    assert tables(result)[0].rows[0][-1] == "5"


def test_text_is_aligned_and_markdown_is_a_table() -> None:
    table = tables(RESULT)[0]
    lines = as_text(table).splitlines()[1:]
    assert len({len(line) for line in lines}) == 1
    markdown = as_markdown(table).splitlines()
    assert markdown[0].startswith("### small: batch16")
    assert len({line.count("|") for line in markdown[2:]}) == 1
    assert "python -m bench" in document([RESULT], as_markdown)
