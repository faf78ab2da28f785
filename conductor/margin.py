"""How far predictions that come near a limit may be off.

A prediction is right on average, so of the requests that are predicted to just keep an SLO nearly
half would miss it. What came of the last ones says how much smaller it must be.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

from conductor.estimate import describe_s

QUANTILE = 0.95  # of requests that should keep the limit
_WINDOW = 64  # predictions that are remembered
_FEWEST = 16  # without which there is no margin
_NEAR = 0.5  # of the limit: smaller predictions have other errors, and nothing to lose
_MOST = 2.0  # what was further off had another reason than the load
_FORGET_S = 60.0  # a margin that turns most away learns little that is new


class Margin:
    """Of predictions for one limit in seconds. Times are the loop's."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._ratios: deque[tuple[float, float]] = deque()  # when; actual to predicted
        self._sorted: list[float] = []

    @property
    def factor(self) -> float:
        """What a prediction is to be multiplied by, so that it is kept in QUANTILE of all cases. At
        least 1: the prediction itself learns from its mean error."""
        if len(self._sorted) < _FEWEST:
            return 1.0
        return max(self._sorted[int(QUANTILE * (len(self._sorted) - 1))], 1.0)

    def add(self, predicted_s: float, actual_s: float, now: float) -> None:
        """What came of a prediction; counts when it was near what is let in."""
        self.forget(now)
        if predicted_s <= 0.0 or predicted_s * self.factor < _NEAR * self.limit_s:
            return
        if len(self._ratios) == _WINDOW:
            self._sorted.remove(self._ratios.popleft()[1])
        ratio = min(actual_s / predicted_s, _MOST)
        self._ratios.append((now, ratio))
        insort(self._sorted, ratio)

    def forget(self, now: float) -> None:
        """What is too old to tell of the load there is."""
        while self._ratios and now - self._ratios[0][0] > _FORGET_S:
            self._sorted.remove(self._ratios.popleft()[1])

    def late_s(self, predicted_s: float) -> float:
        """By how much what is predicted may be over the limit; negative when it will be kept."""
        return predicted_s * self.factor - self.limit_s

    def describe(self, predicted_s: float) -> str:
        factor = self.factor
        margin = f" × {factor:.2f} as a margin," if factor >= 1.005 else ""
        return f"{describe_s(predicted_s)}{margin} is over the SLO of {describe_s(self.limit_s)}"
