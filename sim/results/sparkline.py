"""Curves as lines of text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_LEVELS = " ▁▂▃▄▅▆▇█"
_WIDTH = 72  # characters


def sparklines(curves: Mapping[str, Mapping[str, npt.NDArray[np.float64]]]) -> str:
    """A line for each curve of each row, from 0 to its own highest point, which is written next to
    it; a character is the mean over its part of the time."""
    lines = [
        (row, name, [float(part.mean()) for part in _parts(curve)])
        for row, named in curves.items()
        for name, curve in named.items()
    ]
    row_width = max((len(row) for row, _, _ in lines), default=0)
    name_width = max((len(name) for _, name, _ in lines), default=0)
    return "".join(
        f"{row:<{row_width}}  {name:<{name_width}}  {_line(means)}  0 to {max(means):,.3g}\n"
        for row, name, means in lines
    )


def _parts(curve: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    return np.array_split(curve, min(_WIDTH, len(curve)))


def _line(means: list[float]) -> str:
    top, most = len(_LEVELS) - 1, max(means)
    return "".join(_LEVELS[round(top * mean / most) if most else 0] for mean in means)
