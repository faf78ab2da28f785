"""The Place that is a Ray cluster: placement groups, and an actor in each bundle.

Ray places and tells when something died; it restarts nothing by itself, because a process that
starts again may need another command. Actors and groups belong to this driver's job: when the job
ends, however it does, Ray removes them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from baton.ray.actor import ProcessActor
from baton.ray.keeper import NodeGone
from baton.ray.place import Command, Ended, Node, PlaceLost
from baton.ray.placement import say

_POLL_S = 0.5
_ACTOR_S = 120.0  # a worker process of Ray starts, and imports
_ANSWER_S = 15.0  # of an actor that has nothing to wait for
# While bundles of a dead node are rescheduled, the others are where they were.
_PLACED = ("CREATED", "RESCHEDULING")
_AS_URGENT = {"RAY_worker_niceness": "0"}  # as everything else: Ray gives its workers 15


class RayPlace:
    """`environ` is what every process gets beside its node's own environment."""

    def __init__(self, cluster_name: str, environ: Mapping[str, str]) -> None:
        self._cluster_name = cluster_name
        self._environ = environ

    async def reserve(
        self, name: str, count: int, bundle: Mapping[str, float], strategy: str
    ) -> Sequence[_GroupSlot]:
        title = f"baton {self._cluster_name} {name}"
        group = placement_group([dict(bundle)] * count, strategy=strategy, name=title)
        users = set(range(count))
        return [_GroupSlot(self, bundle, name, group, index, users) for index in range(count)]

    async def on(self, name: str, node: Node, bundle: Mapping[str, float]) -> _NodeSlot:
        return _NodeSlot(self, bundle, name, node)

    async def nodes(self) -> Sequence[Node]:
        return [
            Node(entry["NodeID"], entry["NodeManagerAddress"], entry["Resources"])
            for entry in await asyncio.to_thread(ray.nodes)
            if entry["Alive"]
        ]

    async def find(self, node_id: str) -> Node | None:
        return next((node for node in await self.nodes() if node.id == node_id), None)

    def environ_of(self, command: Command) -> dict[str, str]:
        return {**self._environ, **command.environ}


class _Slot:
    """Has one actor, made when it is first needed and again when it was lost."""

    def __init__(self, place: RayPlace, bundle: Mapping[str, float], name: str) -> None:
        self._place = place
        self._bundle = bundle
        self._name = name
        self._actor: Any = None
        self._actor_node = ""

    async def node(self) -> Node:
        raise NotImplementedError

    async def start(self, command: Command) -> _Running:
        actor = await self._ready_actor(command.name)
        return _Running(self, actor, command.args, self._place.environ_of(command))

    async def free_port(self) -> int:
        actor = await self._ready_actor(self._name)
        return int(await _answer(actor.free_port.remote(), _ANSWER_S))

    async def release(self) -> None:
        self.drop_actor()

    def drop_actor(self) -> None:
        """End it and what runs in it."""
        actor, self._actor = self._actor, None
        if actor is not None:
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)

    def _strategy(self) -> Any:
        raise NotImplementedError

    async def _ready_actor(self, name: str) -> Any:
        """Raises PlaceLost when there is none in time, or on another node than was said."""
        node = await self.node()
        if self._actor is not None and self._actor_node != node.id:
            self.drop_actor()
        if self._actor is None:
            self._actor, self._actor_node = self._make_actor(name), node.id
        try:
            where = await self._whereabouts(node)
            if where != node.id:
                raise PlaceLost(f"{name} was placed anew while it started")
        except BaseException:
            self.drop_actor()
            raise
        return self._actor

    async def _whereabouts(self, node: Node) -> str:
        try:
            return str(await _answer(self._actor.node_id.remote(), _ACTOR_S))
        except PlaceLost as error:
            needs = say(self._bundle)
            text = f"no actor with ({needs}) began on node {node.name}: {error.message}"
            raise PlaceLost(text) from None

    def _make_actor(self, name: str) -> Any:
        others = {k: v for k, v in self._bundle.items() if k not in ("CPU", "GPU", "memory")}
        return (
            ray.remote(ProcessActor)
            .options(
                num_cpus=self._bundle.get("CPU", 0),
                num_gpus=self._bundle.get("GPU", 0),
                memory=int(self._bundle.get("memory", 0)) or None,
                resources=others or None,
                scheduling_strategy=self._strategy(),
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": _AS_URGENT},
            )
            .remote(name)
        )


class _GroupSlot(_Slot):
    """A bundle of a placement group, which is removed with its last user."""

    def __init__(
        self,
        place: RayPlace,
        bundle: Mapping[str, float],
        name: str,
        group: PlacementGroup,
        index: int,
        users: set[int],
    ) -> None:
        super().__init__(place, bundle, name)
        self._group = group
        self._index = index
        self._users = users

    async def node(self) -> Node:
        while True:
            table = await asyncio.to_thread(placement_group_table, self._group)
            if table.get("state") == "REMOVED":
                raise PlaceLost("its placement group was removed")
            if table.get("state") in _PLACED:
                node = await self._place.find(table["bundles_to_node_id"][self._index])
                if node is not None:
                    return node
            await asyncio.sleep(_POLL_S)

    async def release(self) -> None:
        await super().release()
        self._users.discard(self._index)
        if not self._users:
            await asyncio.to_thread(remove_placement_group, self._group)

    def _strategy(self) -> Any:
        return PlacementGroupSchedulingStrategy(self._group, self._index)


class _NodeSlot(_Slot):
    """On one node and nowhere else."""

    def __init__(self, place: RayPlace, bundle: Mapping[str, float], name: str, node: Node) -> None:
        super().__init__(place, bundle, name)
        self._node = node

    async def node(self) -> Node:
        if await self._place.find(self._node.id) is None:
            raise NodeGone(f"node {self._node.name} has gone")
        return self._node

    def _strategy(self) -> Any:
        return NodeAffinitySchedulingStrategy(self._node.id, soft=False)


class _Running:
    def __init__(
        self, slot: _Slot, actor: Any, args: tuple[str, ...], environ: Mapping[str, str]
    ) -> None:
        self._slot = slot
        self._actor = actor
        self._result = actor.run.remote(args, environ)

    async def wait(self) -> Ended:
        try:
            code, tail = await self._result
        except RayError as error:
            self._slot.drop_actor()
            raise PlaceLost(_say(error)) from error
        return Ended(code, tuple(tail))

    async def announcement(self, timeout_s: float) -> dict[str, Any]:
        said = await _answer(self._actor.announcement.remote(timeout_s), timeout_s + _ANSWER_S)
        return dict(said)

    async def stop(self, grace_s: float) -> None:
        try:
            await _answer(self._actor.stop.remote(grace_s), grace_s + _ANSWER_S)
        except PlaceLost:  # it does not answer, or is not there any more
            self._slot.drop_actor()

    async def kill(self) -> None:
        self._slot.drop_actor()


async def _answer(reference: Any, timeout_s: float) -> Any:
    """What an actor says. Raises PlaceLost when it does not, and TimeoutError when it says that."""
    try:
        async with asyncio.timeout(timeout_s):
            return await reference
    except TimeoutError as error:
        if isinstance(error, RayError):  # the actor's own: Ray makes it an instance of both
            raise TimeoutError from None
        raise PlaceLost(f"no answer within {timeout_s:g} s") from None
    except RayError as error:  # it died, or can never begin: its node has gone
        raise PlaceLost(_say(error)) from error


def _say(error: RayError) -> str:
    """The line that says why; a sentence that does not, and indented ids, come before it."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line[0].isspace()]
    telling = [line for line in lines if line != ActorDiedError.BASE_ERROR_MSG]
    return (telling or lines or [type(error).__name__])[0]
