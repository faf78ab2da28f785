"""Curves as lines of text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_LEVELS = " ▁▂▃▄▅▆▇█"
_WIDTH = 72  # characters


def sparklines(curves: Mapping[str, Mapping[str, npt.NDArray[np.float64]]]) -> str:
    """A line for each curve of each row. Curves of one name have one scale, from 0 to the highest
    point of all; a character is the mean over its part of the time."""
    parts = {
        row: {name: [part.mean() for part in _parts(curve)] for name, curve in named.items()}
        for row, named in curves.items()
    }
    most: dict[str, float] = {}
    for named in parts.values():
        for name, means in named.items():
            most[name] = max(most.get(name, 0.0), *means)
    row_width = max(map(len, parts), default=0)
    name_width = max(map(len, most), default=0)
    lines = [
        (row, name, _line(means, most[name]), f"0 to {most[name]:,.3g}")
        for row, named in parts.items()
        for name, means in named.items()
    ]
    return "".join(
        f"{row:<{row_width}}  {name:<{name_width}}  {line}  {scale}\n"
        for row, name, line, scale in lines
    )


def _parts(curve: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    return np.array_split(curve, min(_WIDTH, len(curve)))


def _line(means: list[float], most: float) -> str:
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[round(top * mean / most) if most else 0] for mean in means)
