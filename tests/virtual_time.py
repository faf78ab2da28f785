"""See `sim.virtual_time`."""

from __future__ import annotations

from sim.virtual_time import (
    VirtualTimeLoop,
    run_virtual,
    settle,
    stand_still,
    virtual_time,
    within,
)

__all__ = ["VirtualTimeLoop", "run_virtual", "settle", "stand_still", "virtual_time", "within"]
