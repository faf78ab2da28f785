"""Whether a pool fits into the machines that there are, and if not, why: pure arithmetic.

Ray places; this only says in advance, and while it waits, what a person has to change. Processes of
one pool need the same, so counting them node by node is exact: no search is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.ray.config import ClusterConfig
from baton.ray.place import Node

ELSEWHERE = "other jobs of this Ray cluster may hold what is missing"
_SLACK = 1e-6  # sums of fractions, such as three thirds of a GPU
_MIB = 1 << 20

Bundle = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Wish:
    """`count` times the same `bundle`: as one group, which its strategy holds together or apart and
    which is given back as a whole, or each by itself."""

    name: str
    count: int
    bundle: Bundle
    strategy: str = "PACK"
    one_by_one: bool = False


def wishes(config: ClusterConfig) -> list[Wish]:
    """What the cluster needs to begin with: conductors, then pools. Workers that the planner may
    take away have their room for themselves."""
    part = config.conductors
    found = [Wish("conductor", part.replicas, part.bundle, part.strategy)]
    for name, pool in config.pools.items():
        found.append(Wish(name, pool.least, pool.bundle, pool.strategy))
        found.append(Wish(name, pool.replicas - pool.least, pool.bundle, one_by_one=True))
    return [wish for wish in found if wish.count]


def room(bundle: Bundle, free: Mapping[str, float]) -> int:
    """How many processes with these needs fit into what is free on one node."""
    counts = [free.get(name, 0.0) / amount for name, amount in bundle.items() if amount > 0]
    return max(int(min(counts) + _SLACK), 0) if counts else 0


def free_on(node: Node, held: Sequence[Bundle]) -> dict[str, float]:
    """What is left of a node when these are taken."""
    free = dict(node.total)
    for bundle in held:
        for name, amount in bundle.items():
            free[name] = free.get(name, 0.0) - amount
    return free


def fits(wish: Wish, rooms: Sequence[int]) -> bool:
    """Whether nodes with room for so many of them hold the wish as its strategy has it."""
    if wish.strategy == "STRICT_SPREAD":
        return sum(1 for count in rooms if count) >= wish.count
    if wish.strategy == "STRICT_PACK":
        return max(rooms, default=0) >= wish.count
    return sum(rooms) >= wish.count


def why_not(wish: Wish, nodes: Sequence[Node], held: Mapping[str, Sequence[Bundle]]) -> str:
    """Why a wish cannot be placed, in words, or an empty text when it can.

    `held` are the bundles that are ours already, by node id.
    """
    frees = {node.id: free_on(node, held.get(node.id, ())) for node in nodes}
    rooms = {node.id: room(wish.bundle, frees[node.id]) for node in nodes}
    if fits(wish, list(rooms.values())):
        return ""
    each = f"{wish.count} x ({say(wish.bundle)})"
    how = f", {wish.strategy}" if wish.strategy.startswith("STRICT") else ""
    places = "; ".join(_say_node(node, wish.bundle, frees[node.id], rooms) for node in nodes)
    return f"{wish.name} needs {each}{how}; {places or 'there are no nodes'}"


def take(wish: Wish, nodes: Sequence[Node], held: dict[str, list[Bundle]]) -> None:
    """Book a wish that fits, node after node: where exactly Ray puts it is not known before."""
    left = wish.count
    for node in nodes:
        bundles = held.setdefault(node.id, [])
        fit = min(room(wish.bundle, free_on(node, bundles)), left)
        if wish.strategy == "STRICT_SPREAD":
            fit = min(fit, 1)
        elif wish.strategy == "STRICT_PACK" and fit < wish.count:
            continue
        bundles.extend([wish.bundle] * fit)
        left -= fit


def _say_node(
    node: Node, bundle: Bundle, free: Mapping[str, float], rooms: Mapping[str, int]
) -> str:
    if rooms[node.id]:
        return f"node {node.name} has room for {rooms[node.id]}"
    short = [name for name, amount in bundle.items() if free.get(name, 0.0) + _SLACK < amount]
    lacks = " and ".join(
        f"{_amount(name, free.get(name, 0.0))} of {_amount(name, node.total[name])} {name}"
        if name in node.total
        else f"no {name}"
        for name in short
    )
    return f"node {node.name} has {lacks} left" if lacks else f"node {node.name} has no room"


def say(bundle: Bundle) -> str:
    """For people."""
    return ", ".join(f"{name} {_amount(name, amount)}" for name, amount in bundle.items())


def _amount(name: str, amount: float) -> str:
    amount = max(amount, 0.0)
    return f"{amount / _MIB:g} MiB" if name == "memory" else f"{amount:g}"
