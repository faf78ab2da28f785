"""The highest load at which a fleet still keeps its limits, found with few simulations."""

from __future__ import annotations

import math
from collections.abc import Callable

STEPS = 8  # of a doubling: neighbours differ by 9 %
LEAST, MOST = -4 * STEPS, 4 * STEPS


def speed_of(step: int) -> float:
    """Times as fast as recorded."""
    return round(math.exp2(step / STEPS), 3)


def highest(holds: Callable[[int], bool], least: int = LEAST, most: int = MOST) -> int:
    """The last step of [least, most] that `holds`, as all before it do; least - 1 if none does.

    From step 0 it goes a doubling at a time to where the answer changes, then by halves.
    """
    low, high = least - 1, most + 1  # low holds, high does not
    while high - low > 1:
        if low < least and high > most:
            step = 0
        elif high > most:
            step = min(low + STEPS, most)
        elif low < least:
            step = max(high - STEPS, least)
        else:
            step = (low + high) // 2
        if holds(step):
            low = step
        else:
            high = step
    return low
