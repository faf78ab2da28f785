"""How near the cost model is to what others have measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sim.costs.published import Row, conversation, mooncake, nvidia, table


def test_the_a800_preset_is_within_three_percent_of_what_it_was_fitted_to() -> None:
    fitted = [row for row in mooncake() if "cached" not in row.what]
    assert len(fitted) == 12
    assert max(abs(row.error) for row in fitted) < 0.03


def test_short_prompts_with_a_cached_prefix_are_modelled_as_too_cheap_as_the_docs_say() -> None:
    errors = [row.error for row in mooncake() if "cached" in row.what]
    assert errors == sorted(errors)
    assert errors[0] == pytest.approx(-0.33, abs=0.02)
    assert all(abs(error) < 0.1 for error in errors[2:])


def test_other_engines_are_met_where_computing_dominates() -> None:
    errors = {row.what: row.error for row in nvidia()}
    assert abs(errors["LLaMA2-70B, 4 A100, FP16: first token of 2048"]) < 0.02
    assert all(abs(error) < 0.25 for what, error in errors.items() if "128" not in what)


def test_the_mean_over_a_trace_is_that_of_its_prompts(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [json.dumps({"input_length": tokens}) for tokens in (8192, 16_384)]
    trace.write_text("\n".join(lines) + "\n")
    whole, chunked = conversation(trace)
    assert whole.modelled == pytest.approx((0.973 + 2.033) / 2, rel=0.01)
    steps = (16 + 32) / 2
    assert chunked.modelled - whole.modelled == pytest.approx(steps * 0.0156, rel=0.1)


def test_the_table_shows_how_far_off_a_figure_is() -> None:
    assert table([Row("x", 2.0, 2.2, "s")]).splitlines()[-1] == "| x | 2 s | 2.2 s | +10.0% |"
