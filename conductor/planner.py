"""How many workers should prefill and how many decode, and when it is worth to move one.

    demand of a pool  = workers that its work would keep busy
    pressure(P, D)    = max(prefill demand / P, decode demand / D)

A pool under more pressure than the other one is where SLOs are missed first, so the planner moves a
worker when that lowers the higher pressure by a clear margin. It never chases noise: demands are
averages over time, several looks in a row must agree, a fleet at ease is left alone, and after a
move nothing is judged until its effect can be seen. Pure: the caller measures and acts
(`elastic.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from baton.types.fleet import Role


@dataclass(frozen=True, slots=True)
class PlannerOptions:
    """Times in seconds."""

    look_s: float = 1.0  # between two looks
    average_s: float = 10.0  # time constant of the demands' averages
    settle_s: float = 15.0  # after a move, until the next may be judged
    agree: int = 3  # looks in a row that must want the same
    margin: float = 0.15  # share by which a move must lower the higher pressure
    at_ease: float = 0.5  # pressure below which nothing is moved
    least: int = 1  # workers that each pool keeps
    tpot_s: float | None = None  # that batches should keep; None: the SLO, if there is one
    moves: bool = True  # False: it only says how many workers are wanted
    busy: float = 0.7  # pressure that as many workers as are wanted would be under

    @classmethod
    def settling(cls, settle_s: float, moves: bool = True) -> PlannerOptions:
        """With the other times in proportion."""
        return cls(settle_s / 15, settle_s * 2 / 3, settle_s, moves=moves)


@dataclass(frozen=True, slots=True)
class Look:
    """What was measured. Demands are in workers: 1.7 keeps one busy and another one at 70 %."""

    prefill: int  # workers now
    decode: int
    prefill_demand: float
    decode_demand: float


@dataclass(frozen=True, slots=True)
class Move:
    """One worker should become `role`."""

    role: Role
    reason: str


@dataclass(slots=True)
class Planner:
    options: PlannerOptions = field(default_factory=PlannerOptions)
    _prefill: float = 0.0
    _decode: float = 0.0
    _at: float | None = None  # of the last look
    _wanted: Role | None = None
    _looks: int = 0  # in a row that wanted it
    _not_before: float = -math.inf

    def look(self, look: Look, now: float) -> Move | None:
        """To be called every `look_s`; returns what should be done now. A move that is returned
        counts as made."""
        self._average(look, now)
        if not self.options.moves:
            return None
        role = self._better(look) if now >= self._not_before else None
        self._looks = self._looks + 1 if role is self._wanted else 1
        self._wanted = role
        if role is None or self._looks < self.options.agree:
            return None
        self._not_before = now + self.options.settle_s
        self._wanted, self._looks = None, 0
        return Move(role, self._reason(look, role))

    @property
    def demands(self) -> tuple[float, float]:
        """The averages, prefill and decode."""
        return self._prefill, self._decode

    @property
    def wanted(self) -> tuple[int, int] | None:
        """Workers that would do all that is asked, prefill and decode; None before any look."""
        if self._at is None:
            return None
        prefill, decode = (
            max(math.ceil(demand / self.options.busy), self.options.least)
            for demand in self.demands
        )
        return prefill, decode

    def pressure(self, prefill: int, decode: int) -> float:
        """Of the pool that has more of it, if there were so many workers."""
        return max(_share(self._prefill, prefill), _share(self._decode, decode))

    def _average(self, look: Look, now: float) -> None:
        if self._at is None:
            weight = 1.0
        else:
            weight = 1 - math.exp(-(now - self._at) / self.options.average_s)
        self._at = now
        self._prefill += weight * (look.prefill_demand - self._prefill)
        self._decode += weight * (look.decode_demand - self._decode)

    def _better(self, look: Look) -> Role | None:
        """The pool that one more worker should be in, or None if all is well as it is."""
        options = self.options
        prefill, decode = look.prefill, look.decode
        now = self.pressure(prefill, decode)
        if now < options.at_ease:
            return None
        bound = now * (1 - options.margin)
        if decode > options.least and self.pressure(prefill + 1, decode - 1) < bound:
            return Role.PREFILL
        if prefill > options.least and self.pressure(prefill - 1, decode + 1) < bound:
            return Role.DECODE
        return None

    def _reason(self, look: Look, role: Role) -> str:
        step = 1 if role is Role.PREFILL else -1
        prefill, decode = look.prefill + step, look.decode - step
        return (
            f"{look.prefill}P{look.decode}D is asked for {self._prefill:.2f} prefill and "
            f"{self._decode:.2f} decode workers' work: {prefill}P{decode}D lowers the pressure "
            f"from {self.pressure(look.prefill, look.decode):.2f} to "
            f"{self.pressure(prefill, decode):.2f}"
        )


def _share(demand: float, workers: int) -> float:
    if workers > 0:
        return demand / workers
    return math.inf if demand > 0 else 0.0
