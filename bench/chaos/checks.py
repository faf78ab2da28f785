"""What must hold after a repetition: every answer is right, and no block is held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.types.fleet import BlockState
from bench.chaos.clients import Asking
from bench.chaos.cluster import Cluster
from bench.chaos.references import Answers
from bench.chaos.waiting import until

IDLE_S = 40.0
_IDLE = (BlockState.FREE, BlockState.CACHED)


@dataclass(frozen=True, slots=True)
class Problems:
    """`lost`: requests that ended with an error. `wrong`: those with other tokens than the right
    ones. `leaked`: workers that hold something for nobody."""

    lost: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    leaked: tuple[str, ...] = ()

    @property
    def none(self) -> bool:
        return not (self.lost or self.wrong or self.leaked)

    def __add__(self, other: Problems) -> Problems:
        lost, wrong = self.lost + other.lost, self.wrong + other.wrong
        return Problems(lost, wrong, self.leaked + other.leaked)


async def find_problems(cluster: Cluster, askings: Sequence[Asking], answers: Answers) -> Problems:
    """When all requests have ended."""
    lost = [f"{each.question.name}: {each.error}" for each in askings if each.error]
    wrong = [
        f"{each.question.name}: {difference}"
        for each in askings
        if not each.error
        and (difference := find_difference(each.tokens, answers[each.question.name]))
    ]
    return Problems(tuple(lost), tuple(wrong), await find_leaks(cluster))


def find_difference(tokens: Sequence[int], right: Sequence[int]) -> str:
    """Empty when there is none."""
    if tuple(tokens) == tuple(right):
        return ""
    same = (n for n, (a, b) in enumerate(zip(tokens, right, strict=False)) if a != b)
    first = next(same, min(len(tokens), len(right)))
    return f"{len(tokens)} tokens of {len(right)}, the first difference at {first}"


async def find_leaks(cluster: Cluster) -> tuple[str, ...]:
    """What is still held after a while."""
    found: list[str] = []

    async def none() -> bool:
        found.clear()
        for conductor in cluster.shape.conductor_names:
            members = await cluster.members(conductor)
            found.extend(f"{text} at {conductor}" for text in held(members))
        return not found

    await until(none, IDLE_S)
    return tuple(found)


def held(members: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Of processes that are live. The states of a worker's blocks add up to its pool."""
    for name, member in members.items():
        if member["state"] != "live":
            continue
        kept = {state: n for state, n in member["blocks"].items() if n and state not in _IDLE}
        kept |= {what: n for what in ("running", "waiting") if (n := member[what])}
        total = sum(member["blocks"].values())
        if member["role"] != "store" and total != member["num_blocks"]:
            kept["blocks accounted for"] = total
        if kept:
            yield f"{name}: {kept}"
