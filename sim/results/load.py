"""How the load of prefill and of decode goes up and down, from the records of a run.

Early rejection by the load of the moment lets requests in while few decode, and turns them away
when these have come to decode: one pool is full while the other one is idle (Mooncake's technical
report, section 7.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sim.fleet.records import OK, Record, Table

Floats = npt.NDArray[np.float64]
EVERY_S = 1.0
SETTLED = 0.25  # of the time; until then the cluster fills


@dataclass(frozen=True, slots=True)
class Loads:
    """Requests that were let in, each second until the last one arrives: whose first token is still
    to come, and that decode."""

    prefill: Floats
    decode: Floats

    @property
    def settled(self) -> Loads:
        begin = int(len(self.prefill) * SETTLED)
        return Loads(self.prefill[begin:], self.decode[begin:])

    @property
    def correlation(self) -> float:
        """Of one with the other: negative when one is high while the other is low. NaN when one
        never changes."""
        with np.errstate(invalid="ignore"):
            return float(np.corrcoef(self.prefill, self.decode)[0, 1])


def loads(records: Table[Record]) -> Loads:
    answered = records.where("code", OK)
    came = records.column("at_s")
    times = np.arange(0.0, came.max(), EVERY_S)
    began = came[answered]
    first = began + records.column("ttft_s")[answered]
    end = records.column("end_s")[answered]
    return Loads(_under_way(times, began, first), _under_way(times, first, end))


def variation(load: Floats) -> float:
    """Deviation over mean."""
    return float(load.std() / load.mean()) if load.mean() else float("nan")


def _under_way(times: Floats, begin: Floats, end: Floats) -> Floats:
    """How many have begun and not ended at each of the times."""
    begun = np.searchsorted(np.sort(begin), times, side="right")
    ended = np.searchsorted(np.sort(end), times, side="right")
    return (begun - ended).astype(np.float64)
