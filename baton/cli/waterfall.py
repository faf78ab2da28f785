"""Bars over time in a terminal: the stages of a request's TTFT, and its spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

_BAR_WIDTH = 60
_STAGE_COLUMNS = 40  # characters that a table needs besides its bars
_SPAN_COLUMNS = 46
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue")


def stage_bars(
    stages: Sequence[Mapping[str, Any]], received_s: float, total_s: float, width: int
) -> Table:
    """One line for each stage, and one for what none of them covers, so that all lines add up to
    `total_s`, the time from receipt to the first token."""
    table = _table("", ">ms", ">%", "")
    whole, bar_width = max(total_s, 1e-9), _bar_width(width, _STAGE_COLUMNS)
    for place, stage in enumerate(stages):
        begin, seconds = stage["start_s"] - received_s, stage["seconds"]
        drawn = bar(begin / whole, seconds / whole, bar_width) if seconds > 0 else ""
        name = str(stage["name"]).replace("_", " ")
        _add_stage(table, name, seconds, whole, Text(drawn, _COLOURS[place % len(_COLOURS)]))
    rest = total_s - sum(stage["seconds"] for stage in stages)
    _add_stage(table, "unattributed", max(rest, 0.0), whole, Text())
    return table


def _add_stage(table: Table, name: str, seconds: float, whole: float, drawn: Text) -> None:
    table.add_row(f"  {name}", f"{seconds * 1e3:.2f}", f"{seconds / whole:.1%}", drawn)


def span_bars(timeline: Mapping[str, Any], width: int) -> list[RenderableType]:
    """Each process's own spans over the whole request."""
    spans = timeline.get("spans") or []
    if not spans:
        return []
    bar_width = _bar_width(width, _SPAN_COLUMNS)
    start = min([timeline.get("received_s", 0.0), *(span["start_s"] for span in spans)])
    end = max(span["end_s"] for span in spans)
    total = max(end - start, 1e-9)
    sources = list(dict.fromkeys(span["source"] for span in spans))
    table = _table("source", "span", "", ">start ms", ">ms")
    for span in spans:
        begin, length = span["start_s"] - start, span["end_s"] - span["start_s"]
        colour = _COLOURS[sources.index(span["source"]) % len(_COLOURS)]
        table.add_row(
            span["source"],
            span["name"],
            Text(bar(begin / total, length / total, bar_width), style=colour),
            f"{begin * 1e3:.1f}",
            f"{length * 1e3:.1f}",
        )
    return [Text(), table]


def bar(begin: float, length: float, width: int) -> str:
    """`width` characters with a bar over the share [begin, begin + length]; at least one mark."""
    left = max(min(round(begin * width), width - 1), 0)
    marks = max(1, round((begin + length) * width) - left)
    return (" " * left + "█" * min(marks, width - left)).ljust(width)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _table(*columns: str) -> Table:
    """A column with a > before its name holds figures."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        figures = name.startswith(">")
        table.add_column(
            name.removeprefix(">"), justify="right" if figures else "left", no_wrap=True
        )
    return table


def _bar_width(width: int, others: int) -> int:
    return max(8, min(_BAR_WIDTH, width - others))
