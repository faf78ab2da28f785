"""Results side by side: the same figures of each, and how the others differ from the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sim.report.scales import number, seconds
from sim.report.view import View


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of every result. `changes`: how much more than the first one's, as a share of it;
    None where it cannot be said. `better`: whether that is an improvement."""

    name: str
    texts: tuple[str, ...]
    values: tuple[float | None, ...]
    changes: tuple[float | None, ...]
    better: tuple[bool | None, ...]


@dataclass(frozen=True, slots=True)
class _Figure:
    """`path` in the totals; `more_is_better` None: neither is."""

    name: str
    path: tuple[str, ...]
    text: Callable[[float], str]
    more_is_better: bool | None


_SAME = 0.0005


def _exact(value: float) -> str:
    return f"{value:.1%}"


_FIGURES = (
    _Figure("requests", ("requests",), number, None),
    _Figure("answered", ("codes", "ok"), number, True),
    _Figure("within both SLOs", ("good_share",), _exact, True),
    _Figure("goodput, per second", ("goodput_per_s",), number, True),
    *(
        _Figure(f"{label} {name}", (key, name), seconds, False)
        for label, key in (
            ("TTFT", "ttft_s"),
            ("TPOT", "tbt_mean_s"),
            ("TBT p90 of answers,", "tbt_p90_s"),
        )
        for name in (("p90", "p99") if key == "tbt_p90_s" else ("mean", "p50", "p90", "p99"))
    ),
    _Figure("prompt tokens from caches", ("cached_share",), _exact, True),
    _Figure("answer tokens per second", ("output_tokens_per_s",), number, True),
    _Figure("time computing prompts", ("prefill_busy_s",), seconds, False),
    _Figure("time generating", ("decode_busy_s",), seconds, False),
)


def rows(views: Sequence[View]) -> Iterator[Row]:
    """Figures that no result has are left out."""
    for figure in _FIGURES:
        values = tuple(_value(view.result.totals, figure.path) for view in views)
        if all(value is None for value in values):
            continue
        changes = tuple(_change(values[0], value) for value in values)
        yield Row(
            figure.name,
            tuple("" if value is None else figure.text(value) for value in values),
            values,
            changes,
            tuple(_better(change, figure.more_is_better) for change in changes),
        )


def differences(views: Sequence[View]) -> list[tuple[str, tuple[str, ...]]]:
    """What was simulated differently: keys of the specs and workloads, and each one's value."""
    found = []
    for part in ("spec", "workload"):
        bodies: list[Mapping[str, Any]] = [getattr(view.result, part) for view in views]
        for key in dict.fromkeys(key for body in bodies for key in body):
            values = tuple(str(body.get(key, "")) for body in bodies)
            if len(set(values)) > 1:
                found.append((key, values))
    return found


def as_json(views: Sequence[View]) -> dict[str, Any]:
    return {
        "results": [view.label for view in views],
        "differences": {key: list(values) for key, values in differences(views)},
        "figures": {
            row.name: {"values": row.values, "changes": row.changes} for row in rows(views)
        },
    }


def change_text(change: float | None) -> str:
    if change is None:
        return ""
    if abs(change) < _SAME:
        return "="
    return f"{change:+.1%}" if change < 9 else f"×{1 + change:.1f}"


def _value(totals: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    found: Any = totals
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None or not before else after / before - 1


def _better(change: float | None, more_is_better: bool | None) -> bool | None:
    if change is None or more_is_better is None or abs(change) < _SAME:
        return None
    return (change > 0) == more_is_better
