"""Costs fitted to what the engine's benchmark measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigError
from sim.costs.calibrate import Calibrated, Point, calibrated, fit
from sim.costs.compute import Prefill

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TRUTH = Calibrated(step_s=0.02, token_s=3e-4, pair_s=2e-7, decode_s=1e-3, context_s=6e-6)


def measured(cost: Calibrated) -> list[Point]:
    """What a machine that takes exactly this long shows."""
    steps: dict[str, tuple[list[Prefill], list[int]]] = {
        "prefill 512": ([Prefill(512)], []),
        "prefill 2048": ([Prefill(2048)], []),
        "mixed": ([Prefill(256, 1024)], [1024] * 8),
        **{f"decode {n} x {c}": ([], [c] * n) for n in (1, 8, 32) for c in (1024, 8192)},
    }
    return [
        Point(name, ((tuple(prefill), tuple(decode)),), cost.seconds(prefill, decode))
        for name, (prefill, decode) in steps.items()
    ]


def test_an_exact_machine_is_found_again() -> None:
    found = fit(measured(TRUTH))
    for name in Calibrated.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-6)


def test_an_empty_step_takes_no_time() -> None:
    assert TRUTH.seconds([], []) == 0.0
    assert TRUTH.seconds([], [0]) == pytest.approx(0.021)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.5, 2.0), min_size=9, max_size=9))
def test_no_coefficient_is_negative_and_no_neighbour_is_better(noise: list[float]) -> None:
    points = [
        Point(point.name, point.steps, point.seconds * factor)
        for point, factor in zip(measured(TRUTH), noise, strict=True)
    ]

    def error(cost: Calibrated) -> float:
        return sum(
            (sum(cost.seconds(*step) for step in point.steps) / point.seconds - 1) ** 2
            for point in points
        )

    found = fit(points)
    values = [getattr(found, name) for name in Calibrated.__slots__]
    assert min(values) >= 0
    for index, typical in enumerate(getattr(TRUTH, name) for name in Calibrated.__slots__):
        for change in (-0.01 * typical, 0.01 * typical):
            other = values.copy()
            other[index] = max(0.0, other[index] + change)
            assert error(Calibrated(*other)) >= error(found) - 1e-9


@pytest.mark.parametrize("missing", ["prefill 2048", "decode 1 x"])
def test_figures_that_leave_a_term_open_are_an_error(missing: str) -> None:
    kept = [
        point
        for point in measured(TRUTH)
        if not point.name.startswith((missing, "mixed", "decode 8", "decode 32"))
    ]
    with pytest.raises(ValueError, match="too few figures"):
        fit(kept)
    with pytest.raises(ValueError, match="too few figures"):
        fit([])


@pytest.mark.parametrize(
    ("files", "worst"),
    [
        (("engine-qwen3-0.6b.json",), 0.02),
        (("engine-zen4.json", "engine-zen4-prefill.json"), 0.11),
    ],
)
def test_fit_of_real_machines_is_near_their_own_figures(
    files: tuple[str, ...], worst: float
) -> None:
    found = calibrated("calibrated:" + ",".join(str(RESULTS / name) for name in files))
    assert found.model == "qwen3-0.6b"
    assert found.kv_bytes_per_token == 114_688
    assert found.worst < worst
    assert len(found.errors) >= 7


def report(**changes: Any) -> dict[str, Any]:
    figures = measured(TRUTH)

    def named(kind: str) -> list[dict[str, Any]]:
        kept = [point for point in figures if point.name.startswith(kind)]
        return [{"name": point.name, "median_s": point.seconds} for point in kept]

    prompt = sum(TRUTH.seconds([Prefill(2048, start)], []) for start in (0, 2048, 4096))
    mixed = TRUTH.seconds([Prefill(256, 1024)], [1024] * 8)
    return {
        "model": "m",
        "device": "d",
        "kv_token_bytes": 100,
        "options": {"step_tokens": 2048},
        "prefill": [
            *named("prefill"),
            {"name": "prefill 6144", "median_s": prompt},
            {"name": "prefill 9999", "skipped": "too long"},
        ],
        "decode": named("decode"),
        "mixed": [{"name": "mixed 8 x 1024 and 256 after 1024", "median_s": mixed}],
        **changes,
    }


def write(path: Path, found: object) -> str:
    path.write_text(json.dumps(found))
    return f"calibrated:{path}"


def test_names_of_figures_say_what_was_measured(tmp_path: Path) -> None:
    """Long prompts are several steps; with a mixed step, all fit exactly."""
    found = calibrated(write(tmp_path / "a.json", report()))
    assert found.worst < 1e-6
    assert [name for name, _ in found.errors][-1] == "mixed 8 x 1024 and 256 after 1024"
    assert (found.model, found.device, found.kv_bytes_per_token) == ("m", "d", 100)


def test_an_engine_waits_between_its_steps(tmp_path: Path) -> None:
    loops = [{"gap_s": gap} for gap in (0.001, 0.002, 0.009)]
    found = calibrated(write(tmp_path / "a.json", report(loop=loops)))
    assert found.gap_s == 0.002
    assert found.cost.step_s == pytest.approx(TRUTH.step_s + 0.002)
    assert found.worst < 1e-6


def test_files_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    good = write(tmp_path / "good.json", report())
    other = write(tmp_path / "other.json", report(device="another"))
    with pytest.raises(ConfigError, match="several models or machines"):
        calibrated(f"{good},{other.removeprefix('calibrated:')}")
    with pytest.raises(ConfigError, match="cannot read"):
        calibrated(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="not of `baton bench engine"):
        calibrated(write(tmp_path / "list.json", []))
    with pytest.raises(ConfigError, match="too few figures"):
        calibrated(write(tmp_path / "few.json", report(decode=[])))
    with pytest.raises(ConfigError, match="'speed'"):
        calibrated(write(tmp_path / "name.json", report(mixed=[{"name": "speed", "median_s": 1}])))
    (tmp_path / "text.json").write_text("no")
    with pytest.raises(ConfigError, match="is not JSON"):
        calibrated(str(tmp_path / "text.json"))
