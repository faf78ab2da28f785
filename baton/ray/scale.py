"""How many workers a pool should have, from what the conductor's planner says it wants.

    GET /cluster: conductors[].wanted = {"prefill": 3, "decode": 5}

The planner's figures are averages already; what is added here is patience. A pool grows to the
least that was wanted throughout `up_after_s`, and shrinks to the most that was wanted throughout
`down_after_s`: a worker's weights take long to load, so it goes late. Pure: the caller measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from baton.ray.config import ClusterConfig, Pool, Scale


class Scaler:
    """Of one pool."""

    def __init__(self, least: int, most: int, patience: Scale) -> None:
        self._least = least
        self._most = most
        self._patience = patience
        self._direction = 0  # that was wanted at every look since `_since`
        self._since = 0.0
        self._bound = 0  # nearest to the present size that was wanted since

    def size(self, current: int, wanted: int, now: float) -> int:
        """What the pool should have now. To be called at every look."""
        wanted = min(max(wanted, self._least), self._most)
        direction = (wanted > current) - (wanted < current)
        if direction != self._direction:
            self._direction, self._since, self._bound = direction, now, wanted
        if not direction:
            return current
        self._bound = min(self._bound, wanted) if direction > 0 else max(self._bound, wanted)
        patience = self._patience
        if now - self._since < (patience.up_after_s if direction > 0 else patience.down_after_s):
            return current
        self._direction = 0  # what comes of it is looked at anew
        return self._bound


def planner_says(clusters: Iterable[Mapping[str, Any]]) -> dict[str, int] | None:
    """Workers wanted by role. Of several conductors one plans; None: none has said anything yet."""
    for cluster in clusters:
        for conductor in cluster.get("conductors") or ():
            if wanted := conductor.get("wanted"):
                return {"prefill": int(wanted["prefill"]), "decode": int(wanted["decode"])}
    return None


def wanted_of(
    config: ClusterConfig, pool: Pool, wanted: Mapping[str, int], sizes: Mapping[str, int]
) -> int:
    """What that leaves for a pool that scales, beside the others that do its work."""
    roles = ("prefill", "decode") if pool.role == "elastic" else (pool.role,)
    others = sum(
        sizes.get(name, 0)
        for name, other in config.pools.items()
        if other is not pool and other.role in roles
    )
    return sum(wanted[role] for role in roles) - others
