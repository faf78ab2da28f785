"""A cluster on pretended machines: start, restarts, scaling, loss of nodes, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from baton.ray.config import ClusterConfig
from baton.ray.place import Node, StartFailed
from baton.ray.supervisor import Supervisor
from tests.unit.ray_kit import NODE_A, NODE_B, FakeAsks, FakePlace, Recorder, config, flag
from tests.virtual_time import virtual_time

WITH_MEMORY = [replace(node, total={**node.total, "memory": 1e12}) for node in (NODE_A, NODE_B)]
RESTART = {"failures": 3, "backoff_s": 1.0, "max_backoff_s": 8.0, "stable_s": 60.0}


@dataclass
class Run:
    place: FakePlace
    asks: FakeAsks
    events: Recorder
    supervisor: Supervisor
    task: asyncio.Task[None]

    async def until(self, holds: Callable[[], bool], limit_s: float = 600.0) -> None:
        async with asyncio.timeout(limit_s):
            while not holds():
                assert not self.task.done(), self.task
                await asyncio.sleep(0.1)


@asynccontextmanager
async def up(
    wanted: ClusterConfig, place: FakePlace | None = None, ready: bool = True
) -> AsyncIterator[Run]:
    """A cluster; at the end it is stopped, and nothing of it may be left."""
    place = place or FakePlace()
    asks, events = FakeAsks(place), Recorder()
    supervisor = Supervisor(wanted, place, asks, events)
    began = asyncio.Event()
    task = asyncio.create_task(supervisor.run(lambda _: began.set()))
    if ready:
        async with asyncio.timeout(600):
            await began.wait()
    try:
        yield Run(place, asks, events, supervisor, task)
    finally:
        supervisor.stop()
        await asyncio.wait({task}, timeout=600)
        place.assert_empty()
    if ready:
        task.result()


@virtual_time
async def test_everything_is_started_in_order_and_ended_in_order() -> None:
    async with up(config(store={"memory_mib": 64})) as run:
        started = [name for what, name in run.place.log if what == "start"]
        assert started[0] == "conductor-0"
        assert sorted(started) == sorted(run.place.names())
        stores = {f"store-{node.name}" for node in (NODE_A, NODE_B)}
        assert set(started) == {"conductor-0", "prefill-0", "decode-0"} | stores
        for worker, node in (("prefill-0", NODE_A), ("decode-0", NODE_B)):
            life, store = run.place.find_life(worker), run.place.find_life(f"store-{node.name}")
            assert life.node is store.node is node
            port = flag(store.command, "--listen").rpartition(":")[2]
            assert flag(life.command, "--store") == f"{node.ip}:{port}"
            assert flag(life.command, "--node") == flag(store.command, "--node") == node.name
    stops = [name for what, name in run.place.log if what == "stop"]
    assert stops[0] == "conductor-0"
    assert run.events.names()[-3:] == ["draining", "stopping", "stopped"]
    assert run.events.events[-1][1]["killed"] == []


@virtual_time
async def test_a_killed_worker_comes_back_with_growing_pauses_and_then_is_given_up() -> None:
    wanted = config(
        restart=RESTART,
        pools={"prefill": {"replicas": 2}, "decode": {}},
    )
    async with up(wanted) as run:
        starts: list[float] = []
        for _ in range(2):
            died = asyncio.get_running_loop().time()
            run.place.find_life("prefill-1").die()
            await run.until(lambda: "prefill-1" in run.place.names())
            starts.append(asyncio.get_running_loop().time() - died)
        assert starts == [pytest.approx(2.0, abs=0.2), pytest.approx(3.0, abs=0.2)]
        run.place.find_life("prefill-1").die(1, ("out of memory",))
        await run.until(lambda: "given_up" in run.events.names())
        await asyncio.sleep(300)
        assert run.place.names() == ["conductor-0", "decode-0", "prefill-0"]  # it serves on
        assert len(run.place.slots) == 3  # and its room was given back


@virtual_time
async def test_a_worker_that_lived_long_has_a_clean_record() -> None:
    async with up(config(restart=RESTART)) as run:
        for _ in range(6):
            await asyncio.sleep(RESTART["stable_s"] + 1)
            run.place.find_life("decode-0").die()
            await run.until(lambda: "decode-0" in run.place.names())
        assert "given_up" not in run.events.names()


@virtual_time
async def test_without_anybody_to_decode_the_cluster_ends_with_the_last_words() -> None:
    place, events = FakePlace(), Recorder()
    supervisor = Supervisor(config(restart=RESTART), place, FakeAsks(place), events)

    def ready(_: object) -> None:
        place.on_begin = lambda life: life.die(1, ("no such device",))
        place.find_life("decode-0").die(1, ("no such device",))

    with pytest.raises(StartFailed, match=r"decode-0 ended with exit code 1:\n  no such device"):
        await supervisor.run(ready)
    place.assert_empty()


@pytest.mark.parametrize(("code", "lives"), [(2, 1), (1, 3)])
def test_what_cannot_work_fails_early_at_the_start(code: int, lives: int) -> None:
    @virtual_time
    async def run() -> None:
        place = FakePlace()
        place.on_begin = lambda life: (
            life.die(code, ("unknown option",)) if "decode" in life.command.name else None
        )
        supervisor = Supervisor(config(), place, FakeAsks(place), Recorder())
        with pytest.raises(StartFailed, match=r"decode-0.*\n  unknown option"):
            await supervisor.run(lambda _: pytest.fail("it is not ready"))
        place.assert_empty()
        assert len([life for life in place.lives if "decode" in life.command.name]) == lives

    run()


@virtual_time
async def test_what_has_no_place_is_named_with_the_reason() -> None:
    place = FakePlace(NODE_A)
    wanted = config(timeouts={"place_s": 60})
    events = Recorder()
    with pytest.raises(StartFailed) as failure:
        await Supervisor(wanted, place, FakeAsks(place), events).run(lambda _: None)
    reason = f"decode needs 1 x (CPU 1, decode 1); node {NODE_A.name} has no decode left"
    assert failure.value.message == f"not placed after 60 s:\n  {reason}"
    assert events.said("waiting")[0] == f"waiting: {reason}"
    assert not place.lives
    place.assert_empty()


@virtual_time
async def test_a_conductor_that_says_nothing_is_waited_for_only_so_long() -> None:
    place = FakePlace()
    place.announces = False
    wanted = config(timeouts={"start_s": 30})
    with pytest.raises(StartFailed, match="not listening after 30 s"):
        await Supervisor(wanted, place, FakeAsks(place), Recorder()).run(lambda _: None)
    place.assert_empty()


@virtual_time
async def test_workers_move_when_their_node_dies() -> None:
    spare = Node("c" * 8, "10.0.0.3", {"CPU": 8, "decode": 4})
    place = FakePlace(NODE_A, NODE_B, spare)
    async with up(config(store={"memory_mib": 64}), place) as run:
        assert run.place.find_life("decode-0").node is NODE_B
        run.place.lose(NODE_B)
        await run.until(lambda: "decode-0" in run.place.names())
        moved = run.place.find_life("decode-0")
        assert moved.node is spare
        assert flag(moved.command, "--store").startswith(spare.ip)
        await asyncio.sleep(60)
        assert f"store-{NODE_B.name}" not in run.place.names()
        assert run.events.said("moved") == [
            f"decode-0 moves from node {NODE_B.name} to node {spare.name}"
        ]
        store = f"store-{NODE_B.name}"
        assert run.events.said("node_gone") == [f"{store} ends: the node has gone"]


@virtual_time
async def test_a_worker_waits_for_a_node_as_long_as_it_takes() -> None:
    async with up(config()) as run:
        run.place.lose(NODE_B)
        await asyncio.sleep(20)
        reason = f"decode-0 needs 1 x (CPU 1, decode 1); node {NODE_A.name} has no decode left"
        assert run.events.said("waiting") == [f"waiting: {reason}"]
        await asyncio.sleep(3600)
        assert run.events.said("waiting").count(f"waiting: {reason}") in range(90, 122)
        assert run.place.names() == ["conductor-0", "prefill-0"]
        run.place.alive.append(NODE_B)
        await run.until(lambda: "decode-0" in run.place.names(), limit_s=60)
        said = len(run.events.said("waiting"))
        await asyncio.sleep(300)
        assert len(run.events.said("waiting")) == said


@virtual_time
async def test_a_worker_on_another_node_has_a_clean_record() -> None:
    spare = Node("c" * 8, "10.0.0.3", {"CPU": 8, "decode": 4})
    async with up(config(restart=RESTART), FakePlace(NODE_A, NODE_B, spare)) as run:
        for _ in range(2):
            run.place.find_life("decode-0").die()
            await run.until(lambda: "decode-0" in run.place.names())
            run.place.find_life("decode-0").die()
            await run.until(lambda: "decode-0" in run.place.names())
            run.place.lose(run.place.find_life("decode-0").node)
            run.place.alive.append(Node("d" * 8, "10.0.0.4", {"CPU": 8, "decode": 4}))
            await run.until(lambda: "decode-0" in run.place.names())
        assert "given_up" not in run.events.names()


@virtual_time
async def test_a_conductor_listens_where_it_did_unless_its_node_died() -> None:
    pools = {"decode": {"resources": {"decode": 1}}}
    place = FakePlace(NODE_B, Node("d" * 8, "10.0.0.4", {"CPU": 8, "decode": 4}))
    async with up(config(pools=pools, conductors={"port": 0, "grpc_port": 0}), place) as run:
        first = run.place.find_life("conductor-0")
        assert flag(first.command, "--port") == "0"
        told = flag(run.place.find_life("decode-0").command, "--conductor")
        first.die()
        await run.until(lambda: len(run.events.said("listening")) == 2)
        again = run.place.find_life("conductor-0")
        assert f"{again.node.ip}:{flag(again.command, '--grpc-port')}" == told
        run.place.lose(NODE_B)
        await run.until(lambda: len(run.events.said("listening")) == 3)
        await run.until(lambda: "decode-0" in run.place.names())
        await asyncio.sleep(30)
        now = flag(run.place.find_life("decode-0").command, "--conductor")
        assert now.startswith("10.0.0.4:")
        assert now != told
        assert "given_up" not in run.events.names()


@virtual_time
async def test_pools_follow_the_planner_between_their_bounds() -> None:
    pool = {"resources": {"decode": 1}, "min_replicas": 1, "max_replicas": 3}
    wanted = config(
        pools={"prefill": {}, "decode": pool},
        scale={"look_s": 1, "up_after_s": 5, "down_after_s": 60},
    )

    def decoding(run: Run) -> list[str]:
        return [name for name in run.place.names() if name.startswith("decode")]

    async with up(wanted) as run:
        assert "--advise" in run.place.find_life("conductor-0").command.args
        run.asks.wanted = {"prefill": 5, "decode": 9}
        await run.until(lambda: len(decoding(run)) == 3)
        await asyncio.sleep(120)
        assert run.place.names() == ["conductor-0", *decoding(run), "prefill-0"]
        assert decoding(run) == ["decode-0", "decode-1", "decode-2"]
        run.asks.wanted = {"prefill": 1, "decode": 1}
        await run.until(lambda: decoding(run) == ["decode-0"])
        assert ("stop", "decode-2") in run.place.log  # SIGTERM: it drains
        assert ("kill", "decode-2") not in run.place.log
        await run.until(lambda: len(run.events.said("left")) == 2)
        assert sorted(run.events.said("left")) == ["decode-1 has left", "decode-2 has left"]
        run.asks.wanted = {"prefill": 1, "decode": 2}
        await run.until(lambda: decoding(run) == ["decode-0", "decode-1"])  # names are used again
        assert run.events.names().count("scaling") == 3


@virtual_time
async def test_a_worker_that_does_not_drain_is_killed_and_that_is_said() -> None:
    pool = {"resources": {"decode": 1}, "replicas": 2, "min_replicas": 1, "max_replicas": 2}
    scale = {"look_s": 1, "up_after_s": 1, "down_after_s": 1}
    wanted = config(pools={"prefill": {}, "decode": pool}, scale=scale, timeouts={"drain_s": 10})
    async with up(wanted) as run:
        run.place.find_life("decode-1").stubborn = True
        run.asks.wanted = {"prefill": 1, "decode": 1}
        await run.until(lambda: "left" in run.events.names())
        said = "decode-1 was killed: it had not drained after 15 s"
        assert run.events.said("left") == [said]


@virtual_time
async def test_a_worker_without_a_place_is_taken_back_first() -> None:
    pool = {"resources": {"decode": 1}, "replicas": 2, "min_replicas": 1, "max_replicas": 9}
    scale = {"look_s": 1, "up_after_s": 1, "down_after_s": 1}
    async with up(config(pools={"prefill": {}, "decode": pool}, scale=scale)) as run:
        run.asks.wanted = {"prefill": 1, "decode": 6}  # there is room for four
        await run.until(lambda: len(run.place.slots) == 8)
        await asyncio.sleep(60)
        run.asks.wanted = {"prefill": 1, "decode": 4}
        await run.until(lambda: len(run.place.slots) == 6)
        assert not [name for what, name in run.place.log if what == "stop"]


@virtual_time
async def test_a_second_stop_waits_for_nobody() -> None:
    async with up(config(timeouts={"drain_s": 500})) as run:
        run.place.find_life("conductor-0").stubborn = True
        run.supervisor.stop()
        await asyncio.sleep(20)
        assert not run.task.done()
        run.supervisor.stop()
        before = asyncio.get_running_loop().time()
        await run.task
        assert asyncio.get_running_loop().time() - before < 1
    assert run.events.events[-1][1]["killed"][0] == "conductor-0"


@pytest.mark.parametrize("after_s", [0.0, 0.4, 0.9, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 6.0])
def test_it_can_be_stopped_at_any_moment(after_s: float) -> None:
    @virtual_time
    async def run() -> None:
        async with up(config(store={"memory_mib": 64}), ready=False) as started:
            await asyncio.sleep(after_s)
        started.task.result()

    run()


@pytest.mark.parametrize("after_s", [0.0, 0.4, 1.5, 2.5, 3.5, 30.0])
def test_cancelling_leaves_nothing(after_s: float) -> None:
    @virtual_time
    async def run() -> None:
        place = FakePlace()
        supervisor = Supervisor(config(), place, FakeAsks(place), Recorder())
        task = asyncio.create_task(supervisor.run(lambda _: None))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.wait({task}, timeout=300)
        assert task.cancelled()
        place.assert_empty()

    run()


happenings = st.lists(
    st.tuples(
        st.sampled_from(["die", "lose", "kill node", "add node", "want more", "want fewer"]),
        st.integers(0, 9),
        st.sampled_from([0.0, 0.3, 1.0, 2.5, 20.0]),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=25)
@given(happenings)
# A worker is told of a conductor that moves just then; a node dies while its store begins.
@example([("die", 0, 2.5), ("die", 0, 0.0), ("kill node", 0, 0.0), ("kill node", 0, 1.0)])
@example([("kill node", 0, 2.5), ("add node", 9, 0.0), ("kill node", 1, 20.0)])
def test_whatever_happens_it_comes_back_and_leaves_nothing(
    what: list[tuple[str, int, float]],
) -> None:
    spares = [
        Node(f"{i}" * 8, f"10.0.1.{i}", {"CPU": 8, "prefill": 2, "decode": 4}) for i in range(12)
    ]
    pool = {"resources": {"decode": 1}, "min_replicas": 1, "max_replicas": 3}
    wanted = config(
        pools={"prefill": {"resources": {"prefill": 1}}, "decode": pool},
        store={"memory_mib": 64},
        restart={**RESTART, "failures": 0},
        scale={"look_s": 1, "up_after_s": 2, "down_after_s": 4},
    )

    def happen(run: Run, event: str, number: int) -> None:
        lives = run.place.running
        match event:
            case "die" if lives:
                lives[number % len(lives)].die()
            case "lose" if lives:
                lives[number % len(lives)].lose()
            case "kill node" if run.place.alive:
                run.place.lose(run.place.alive[number % len(run.place.alive)])
            case "add node":
                run.place.alive.append(spares.pop())
            case "want more" | "want fewer":
                decode = 3 if event == "want more" else 1
                run.asks.wanted = {"prefill": 1, "decode": decode}

    @virtual_time
    async def run() -> None:
        async with up(wanted, FakePlace(*WITH_MEMORY)) as cluster:
            for event, number, pause_s in what:
                happen(cluster, event, number)
                await asyncio.sleep(pause_s)
            cluster.place.alive.append(spares.pop())
            cluster.asks.wanted = {"prefill": 1, "decode": 2}
            await asyncio.sleep(120)
            names = cluster.place.names()
            assert [n for n in names if "store" not in n] == sorted(
                ["conductor-0", "prefill-0", *(n for n in names if n.startswith("decode"))]
            )
            assert len([n for n in names if n.startswith("decode")]) == 2
            workers = [x for x in cluster.place.running if "conductor" not in x.command.name]
            stores = {x.node.name for x in workers if "store" in x.command.name}
            assert {x.node.name for x in workers} <= stores
            (conductor,) = [x for x in cluster.place.running if x not in workers]
            for worker in workers:  # everybody knows where the conductor is
                assert flag(worker.command, "--conductor").startswith(conductor.node.ip)

    run()
