"""One measured rate of the machine. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rate:
    """`per_s` is FLOP/s or bytes/s, by the best repetition; `nbytes` is the memory that was read
    or copied (for a product: 0). `counts` is false for figures that are only shown."""

    name: str
    per_s: float
    nbytes: int = 0
    counts: bool = True
