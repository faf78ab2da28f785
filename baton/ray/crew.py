"""Who is in the cluster: conductors, a store on each node that has workers, pools of workers.

Every member has a keeper that runs as a task of `group`. A worker's command depends on where it is
placed: it is told of the store of that very node, which is started before it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

from baton.ray.commands import (
    Listening,
    conductor_command,
    conductor_name,
    store_command,
    worker_command,
    worker_name,
)
from baton.ray.config import ClusterConfig
from baton.ray.keeper import Keeper, NodeGone, State, Work
from baton.ray.place import Command, Events, Node, Place, PlaceLost, Running, Slot
from baton.ray.placement import ELSEWHERE, Bundle, Wish, take, why_not, wishes

_HINDERED = f"{ELSEWHERE}, or its pool's strategy forbids it"
_HOLDS = (State.STARTING, State.RUNNING, State.PAUSING)  # its place, meanwhile


@dataclass(frozen=True, slots=True)
class _Seat:
    """Of a node's store. Its address stays, so that workers find it again."""

    keeper: Keeper
    address: str


class Crew:
    def __init__(
        self,
        config: ClusterConfig,
        place: Place,
        events: Events,
        group: asyncio.TaskGroup,
        on_given_up: Callable[[Keeper], None],
        patient: Callable[[], bool],
    ) -> None:
        self.listening: dict[int, Listening] = {}  # conductors, by number
        self.all_listen = asyncio.Event()
        self.conductors: dict[int, Keeper] = {}
        self.pools: dict[str, dict[int, Keeper]] = {name: {} for name in config.pools}
        self._config = config
        self._place = place
        self._events = events
        self._group = group
        self._on_given_up = on_given_up
        self._patient = patient
        self._slots: dict[str, list[Slot]] = {}  # reserved, not taken yet
        self._stores: dict[str, _Seat] = {}  # by node id
        self._store_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by node id
        self._conductor_node: dict[int, str] = {}  # ids, where they listened last

    @property
    def members(self) -> Iterator[Keeper]:
        yield from self.conductors.values()
        for pool in self.pools.values():
            yield from pool.values()
        yield from self.stores

    @property
    def stores(self) -> list[Keeper]:
        return [seat.keeper for seat in self._stores.values()]

    @property
    def workers(self) -> list[Keeper]:
        return [keeper for pool in self.pools.values() for keeper in pool.values()]

    @property
    def sizes(self) -> dict[str, int]:
        """Workers of each pool that are kept, running or not."""
        return {
            name: sum(keeper.kept for keeper in pool.values()) for name, pool in self.pools.items()
        }

    async def reserve(self) -> None:
        """Ask for all room at once, so that it is known early what does not fit."""
        for wish in wishes(self._config):
            slots = self._slots.setdefault(wish.name, [])
            at_once = 1 if wish.one_by_one else wish.count
            for _ in range(0, wish.count, at_once):
                slots += await self._place.reserve(wish.name, at_once, wish.bundle, wish.strategy)

    async def placed(self) -> None:
        """Wait until there is room for everything that was reserved."""
        for name, slots in self._slots.items():
            nodes = [(await slot.node()).name for slot in slots]
            self._events.event("placed", f"{name}: {', '.join(nodes)}", name=name, nodes=nodes)

    async def unplaced(self) -> list[str]:
        """For people: which pools cannot be placed, and why."""
        nodes = await self._place.nodes()
        held: dict[str, list[Bundle]] = {}
        found = []
        for wish in wishes(self._config):
            if text := why_not(wish, nodes, held):
                found.append(text)
            else:
                take(wish, nodes, held)
        return found

    @property
    def homeless(self) -> set[str]:
        """Names of those that wait for a place, now that all have started."""
        return {keeper.name for keeper in self.members if keeper.state is State.PLACING}

    async def why_homeless(self, names: Set[str]) -> dict[str, str]:
        """For people: what each of these needs, and what the nodes have left of it."""
        nodes = await self._place.nodes()
        held: dict[str, list[Bundle]] = {}
        unmet = []
        for keeper, bundle in self._needs():
            if keeper.name in names:
                unmet.append(Wish(keeper.name, 1, bundle))
            elif keeper.node is not None and keeper.state in _HOLDS:
                held.setdefault(keeper.node.id, []).append(bundle)
        return {
            wish.name: why_not(wish, nodes, held) or f"{wish.name} would fit; {_HINDERED}"
            for wish in unmet
        }

    def _needs(self) -> Iterator[tuple[Keeper, Bundle]]:
        """What each process takes from its node."""
        config = self._config
        yield from ((keeper, config.conductors.bundle) for keeper in self.conductors.values())
        for name, pool in self.pools.items():
            yield from ((keeper, config.pools[name].bundle) for keeper in pool.values())
        if config.store is not None:
            yield from ((keeper, config.store.bundle) for keeper in self.stores)

    def start_conductors(self) -> None:
        for number, slot in enumerate(self._slots.pop("conductor")):
            self.conductors[number] = self._keep(
                Work(
                    conductor_name(number),
                    slot,
                    lambda node, number=number: self._conductor(number, node),  # type: ignore[misc]
                    lambda node, running, number=number: self._listens(number, node, running),  # type: ignore[misc]
                )
            )

    def start_workers(self) -> None:
        for pool in self._config.pools:
            for number, slot in enumerate(self._slots.pop(pool, ())):
                self._start_worker(pool, number, slot)

    async def add(self, pool: str) -> str:
        """One more worker. Returns its name."""
        self._forget_ended(pool)
        number = next(n for n in range(len(self.pools[pool]) + 1) if n not in self.pools[pool])
        name, bundle = worker_name(pool, number), self._config.pools[pool].bundle
        (slot,) = await self._place.reserve(name, 1, bundle, "PACK")
        self._start_worker(pool, number, slot)
        return name

    def last(self, pool: str) -> Keeper:
        """The one that goes when there should be fewer: one that has no place yet, or the newest.
        The first ones share a placement group, which is given back as a whole."""
        least = self._config.pools[pool].least
        kept = {number: keeper for number, keeper in self.pools[pool].items() if keeper.kept}
        waits = {number: kept[number].state is State.PLACING and number >= least for number in kept}
        return kept[max(kept, key=lambda number: (waits[number], number))]

    async def release(self) -> None:
        """Give back what was reserved and never taken."""
        for slots in self._slots.values():
            for slot in slots:
                await slot.release()
        self._slots.clear()

    def _forget_ended(self, pool: str) -> None:
        kept = self.pools[pool]
        self.pools[pool] = {n: k for n, k in kept.items() if k.kept}

    def _start_worker(self, pool: str, number: int, slot: Slot) -> None:
        async def make(node: Node) -> Command:
            store = await self._store_on(node)
            conductors = tuple(self.listening.values())
            return worker_command(self._config, pool, number, node, conductors, store)

        self.pools[pool][number] = self._keep(Work(worker_name(pool, number), slot, make))

    def _keep(self, work: Work) -> Keeper:
        keeper = Keeper(work, self._config.restart, self._events, self._patient)
        self._group.create_task(self._run(keeper), name=keeper.name)
        return keeper

    async def _run(self, keeper: Keeper) -> None:
        await keeper.run()
        for node_id, seat in tuple(self._stores.items()):
            if seat.keeper is keeper:  # its node has gone, or it was given up
                del self._stores[node_id]
        if keeper.state is State.GIVEN_UP:
            self._on_given_up(keeper)

    async def _conductor(self, number: int, node: Node) -> Command:
        same = self._conductor_node.get(number) == node.id
        known = self.listening.get(number) if same else None
        return conductor_command(self._config, number, node, known)

    async def _listens(self, number: int, node: Node, running: Running) -> None:
        """Learn where a conductor listens. Members that were told another address must hear it."""
        try:
            said = await running.announcement(self._config.timeouts.start_s)
            http, grpc, for_workers = (
                f"{node.ip}:{said[key].rpartition(':')[2]}"
                for key in ("http", "grpc", "for_workers")
            )
        except TimeoutError:
            await running.kill()
            return
        except PlaceLost:
            return  # its keeper hears of that, too
        now = Listening(http, grpc, for_workers if for_workers != grpc else "", said["scheme"])
        before = self.listening.get(number)
        self.listening[number], self._conductor_node[number] = now, node.id
        name = conductor_name(number)
        self._events.event("listening", f"{name}: {http}", name=name, http=http, grpc=grpc)
        if len(self.listening) == self._config.conductors.replicas:
            self.all_listen.set()
        if before not in (None, now) and not self._config.redis:
            grace_s = self._config.timeouts.drain_s
            for member in (*self.workers, *self.stores):
                self._group.create_task(member.renew(grace_s), name=f"{member.name} renewed")

    async def _store_on(self, node: Node) -> str:
        """The address of that node's store, which is started if there is none. Raises PlaceLost."""
        store = self._config.store
        if store is None:
            return ""
        async with self._store_locks[node.id]:
            if node.id not in self._stores:
                slot = await self._place.on(f"store-{node.name}", node, store.bundle)
                try:
                    port = store.port or await slot.free_port()
                except BaseException as error:
                    await slot.release()
                    if isinstance(error, NodeGone):  # for the store, but not for who asks
                        raise PlaceLost(error.message) from None
                    raise

                async def make(node: Node) -> Command:
                    conductors = tuple(self.listening.values())
                    return store_command(self._config, store, node, port, conductors)

                keeper = self._keep(Work(f"store-{node.name}", slot, make))
                self._stores[node.id] = _Seat(keeper, f"{node.ip}:{port}")
            return self._stores[node.id].address
