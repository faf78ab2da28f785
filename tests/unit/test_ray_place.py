"""What Ray says, as the Place understands it. The rest of it runs on a real Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("ray", reason="pip install 'baton-llm[ray]'")

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    RayError,
)

from baton.ray import ray_place
from baton.ray.place import Node, PlaceLost
from baton.ray.ray_place import RayPlace

HEAD, DEAD, SPARE = (Node(letter * 8, "10.0.0.1") for letter in "abc")


class Tables:
    """What Ray says of a placement group, look after look; the last one stays."""

    def __init__(self, *tables: tuple[str, str, str]) -> None:
        """Each: the group's state, and the nodes of its two bundles."""
        self._tables = list(tables)

    def __call__(self, _group: object) -> dict[str, Any]:
        state, *nodes = self._tables.pop(0) if len(self._tables) > 1 else self._tables[0]
        return {"state": state, "bundles_to_node_id": dict(enumerate(nodes))}


class Alive(RayPlace):
    def __init__(self, *nodes: Node) -> None:
        super().__init__("test", {})
        self._alive = nodes

    async def nodes(self) -> Sequence[Node]:
        return self._alive


@pytest.mark.parametrize(
    ("index", "tables"),
    [
        (0, [("PENDING", "", ""), ("CREATED", HEAD.id, SPARE.id)]),
        # Ray has not noticed that a node died, or looks for another one: the rest stays.
        (0, [("RESCHEDULING", HEAD.id, "")]),
        (0, [("CREATED", HEAD.id, DEAD.id)]),
        (
            1,
            [
                ("CREATED", SPARE.id, DEAD.id),
                ("RESCHEDULING", SPARE.id, ""),
                ("PREPARED", SPARE.id, HEAD.id),
                ("CREATED", SPARE.id, HEAD.id),
            ],
        ),
    ],
)
async def test_a_bundle_is_on_a_living_node(
    index: int, tables: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_place, "placement_group_table", Tables(*tables))
    monkeypatch.setattr(ray_place, "_POLL_S", 0)
    group: Any = None
    slot = ray_place._GroupSlot(Alive(HEAD, SPARE), {}, "decode", group, index, {0, 1})
    assert await slot.node() == HEAD


async def test_an_actor_that_can_never_begin_has_lost_its_place() -> None:
    """Ray says so of one that is bound to a dead node."""

    async def answer() -> None:
        raise ActorUnschedulableError("node affinity: the node is dead")

    with pytest.raises(PlaceLost, match="not schedulable: node affinity"):
        await ray_place._answer(answer(), 1.0)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ActorDiedError(), ActorDiedError.BASE_ERROR_MSG),
        (ActorUnavailableError("RpcError: closed", None), "The actor None is unavailable"),
        (ActorUnschedulableError("no node"), "The actor is not schedulable: no node"),
    ],
)
def test_why_it_died_is_said_in_one_line(error: RayError, said: str) -> None:
    assert ray_place._say(error).startswith(said)
