"""Overheads from lone requests, and the table of what was measured and predicted."""

from dataclasses import replace
from pathlib import Path

import pytest

from baton.bench.stats import Outcome
from baton.client.http import Usage
from baton.client.timing import Timing
from bench.calibration.load import asks, poisson, requests
from bench.calibration.overheads import Lone, fit_overheads
from bench.calibration.page import MARK, write_page
from bench.calibration.results import Seen, as_markdown, rows
from sim.costs.compute import Prefill
from sim.costs.serving import Overheads
from tests.unit.calibration_kit import ENGINE, OVERHEADS


def lone(together: int, prompt: int, output: int) -> Lone:
    """What a cluster shows that takes exactly that."""
    prefill = ENGINE.seconds([Prefill(prompt)], []) + 0.003 + 1e-5 * prompt
    step = ENGINE.seconds([], [prompt + output // 2] * together) + 0.001 + 3e-4 * together
    reports, tokens = together + output - 1, together * output
    handoff = 0.004 + 0.001 * -(-prompt // 512)
    return Lone(
        together=together,
        prompt=prompt,
        output=output,
        ttft_s=0.002 + 1e-6 * prompt + 0.001 + prefill + 7e-4,
        first_gap_s=handoff + 0.002 + step if output > 1 else None,
        gap_s=step if output > 2 else None,
        front_cpu_s=together * (0.002 + 1e-6 * prompt) + 5e-4 * reports + 2e-4 * tokens,
        prefill_cpu_s=prefill + (0.0005 if output > 1 else 0.0),
        decode_cpu_s=handoff + step * (output - 1) if output > 1 else 0.0,
    )


def test_overheads_of_an_exact_cluster_are_found_again() -> None:
    some = [lone(n, 64, 40) for n in (3, 8)]
    found = fit_overheads(
        [lone(1, p, o) for p in (64, 512, 1024) for o in (1, 16, 40)] + some, ENGINE
    )
    for name in Overheads.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(OVERHEADS, name), rel=1e-3), name


def test_what_the_client_does_not_wait_for_is_lending() -> None:
    sooner = [
        replace(lone(1, p, o), ttft_s=lone(1, p, o).ttft_s - 0.0025)
        for p in (64, 512, 1024)
        for o in (1, 40)
    ]
    found = fit_overheads([*sooner, lone(4, 64, 40)], ENGINE)
    assert found.ask_wait_s == 0.0
    assert found.lend_s == pytest.approx(0.002, rel=1e-3)
    assert found.prefill_s == pytest.approx(0.0015, rel=1e-3)


def test_cpu_time_that_no_client_waited_for_is_no_handoff() -> None:
    """Half a millisecond more in each step of an answer, beside what its tokens wait for."""
    busy = [
        replace(one, decode_cpu_s=one.decode_cpu_s + 0.0005 * (one.output - 1))
        for one in (lone(1, p, o) for p in (64, 512, 1024) for o in (1, 16, 40))
    ]
    found = fit_overheads(busy, ENGINE)
    for blocks in (1, 2):
        total = found.handoff_s + found.handoff_block_s * blocks + found.handoff_wait_s
        assert total == pytest.approx(0.006 + 0.001 * blocks, rel=1e-3)


def test_both_clusters_are_asked_the_same() -> None:
    planned = poisson(50, 10.0, seed=3)
    assert planned == poisson(50, 10.0, seed=3)
    assert planned[-1].at_s == pytest.approx(5.0, rel=0.5)
    real, simulated = asks(planned, 8192, seed=3), requests(planned)
    assert [len(ask.prompt) for ask in real] == [one.input_tokens for one in simulated]
    assert [ask.output_tokens for ask in real] == [one.output_tokens for one in simulated]
    blocks = [block for one in simulated for block in one.blocks]
    assert len(set(blocks)) == len(blocks)  # nobody has a prefix in a cache


def test_the_table_says_how_far_a_prediction_is_off() -> None:
    first = Seen((0.1, 0.3), (0.01, None))
    second = Seen((0.2, 0.4), (0.02, None))
    table = list(rows("1P+1D", [first, second], Seen((0.2, 0.2), (0.03, None))))
    assert [row.figure for row in table] == ["mean TTFT", "p90 TTFT", "mean TPOT", "p90 TPOT"]
    assert table[0].error == pytest.approx(0.2 / 0.25 - 1)
    assert table[0].noise == pytest.approx(0.1 / 0.25)
    assert table[2].error == pytest.approx(1.0)
    assert "| 1P+1D | mean TTFT | 200.0 | 300.0 | 40.0% | 200.0 | -20.0% |" in as_markdown(table)
    assert Seen.from_json(first.as_json()) == first  # type: ignore[arg-type]


def test_a_run_with_failures_is_no_measurement() -> None:
    good = Outcome(0.0, 1.0, timing=Timing((0.1, 0.3), 0.4, Usage(8, 2)))
    assert Seen.of([good]) == Seen((0.1,), (pytest.approx(0.2),))
    with pytest.raises(SystemExit, match="1 requests failed: no end"):
        Seen.of([good, Outcome(0.0, 1.0, error="no end")])


def test_a_page_is_made_anew_and_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    seen = Seen((0.2, 0.4), (0.02, 0.04))
    run = seen.as_json() | {
        "cpu_s": {"front": 1.0, "prefill": 2.0, "decode": 3.0, "others": 0.5},
        "ttft_parts": {"queue": 0.1, "fetch": 0.0, "prefill": 0.2},
    }
    told = {
        "command": "python -m bench.calibration",
        "time": "2026-11-21T22:00:00+00:00",
        "machine": {"processor": "a processor", "cpus_of_machine": 2},
        "revision": "abc",
        "planned": [{}, {}],
        "rate_per_s": 3.0,
        "prompts": [128, 256, 512],
        "outputs": [8, 24],
        "shape": "small",
        "measured": {"1P+1D": [run]},
        "predicted": {"1P+1D": run},
        "calibration": {
            "device": "one core",
            "serving": {"overheads": {"ask_s": 0.002}, "beside": {"prefill": {"decode": 1.25}}},
        },
    }
    page = tmp_path / "calibration.md"
    write_page(page, told, list(rows("1P+1D", [seen], seen)), 0.05)
    page.write_text(page.read_text() + "A remark.\n")
    write_page(page, told, list(rows("1P+1D", [seen], seen)), 0.05)
    text = page.read_text()
    assert "The largest error is 0.0%." in text
    assert "prompts of 128, 256 or 512 tokens" in text.replace("\n", " ")
    assert "| 1P+1D, run 1 | 300.0 | 1.0 | 2.0 | 3.0 | 0.5 |" in text
    assert "| `ask` | 2.0000 |" in text
    assert "prefill beside decode × 1.25" in text
    assert text.endswith(f"{MARK}\nA remark.\n")
