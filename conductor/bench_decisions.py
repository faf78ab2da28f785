"""Decisions: what `route` costs in a large cluster, with the prefix map's matches for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from baton.bench.stats import percentile
from baton.hashing import KEY_BYTES
from baton.types.fleet import KvLayout, Role, WorkerInfo, WorkerLoad, WorkerState
from baton.types.kv_events import KvSnapshot, Tier
from baton.types.request import AttemptId
from conductor.backlog import Ahead, Backlog
from conductor.bench_figures import Figure, Plan, latencies, timed
from conductor.expected import ExpectedBlocks
from conductor.policies import RoutePolicy
from conductor.prefix_map import PrefixMap
from conductor.ring import Ring
from conductor.router import RouteOptions, RouteRequest, group_of, route
from conductor.views import Board, FleetView, WorkerView, boards_of

ROUNDS = 1000
HOLDERS = 8  # of a part of the prompt, each of another length
ANSWER_TOKENS = 256
CROWD_TOKENS = 2048  # of a prompt, half of which every worker has


def measure_decisions(plan: Plan) -> Iterator[Figure]:
    """A long prompt of which HOLDERS workers have parts, a short one that nobody has, and the view
    of the fleet that a decision needs when two workers have changed."""
    random = np.random.default_rng(plan.seed)
    workers = _workers(plan, random)
    names = [worker.info.name for worker in workers if worker.info.role is Role.PREFILL]
    fleet = FleetView(workers, Ring.of(names))
    keys = random.bytes(plan.prompt_blocks * KEY_BYTES)
    known = _map_of(keys, names, plan)
    prompt = tuple(range(plan.prompt_tokens))

    def decide(number: int, policy: RoutePolicy) -> None:
        matches = known.matches(keys)
        asked = RouteRequest(
            str(number), prompt, ANSWER_TOKENS, number=number, keys=keys, matches=matches
        )
        route(asked, fleet, 0.0, RouteOptions(policy, 0))

    for policy in (RoutePolicy.CACHE_AWARE, RoutePolicy.LEAST_LOADED):
        samples = timed(partial(decide, number, policy) for number in range(ROUNDS))
        name = f"{policy.value}, {plan.prompt_tokens} tokens, with matches"
        yield from latencies("decisions", name, samples, "p99 < 1 ms")
    yield from _measure_crowd(plan, fleet)
    short = RouteRequest("r", prompt[:512], ANSWER_TOKENS, keys=keys[: 16 * KEY_BYTES])
    samples = timed([partial(route, short, fleet, 0.0)] * ROUNDS)
    yield from latencies("decisions", "512 tokens that nobody has", samples, "")
    samples = timed([partial(_view_after, workers[:2], boards_of(workers), fleet)] * ROUNDS)
    view_s = percentile(samples, 50)
    yield Figure("decisions", "view of the fleet after a change", view_s * 1e6, "µs")
    alone_s = percentile(timed([partial(decide, 0, RoutePolicy.CACHE_AWARE)] * ROUNDS), 50)
    yield Figure("decisions", "decisions on one core", 1 / (alone_s + view_s), "/s")
    samples = timed([_decide_small(plan)] * ROUNDS)
    yield from latencies("decisions", "2P2D, 2048 tokens, with matches and view", samples, "")


def _measure_crowd(plan: Plan, fleet: FleetView) -> Iterator[Figure]:
    """A prompt that begins with what every worker holds, as a system prompt soon is."""
    random, shared = np.random.default_rng(plan.seed), CROWD_TOKENS // plan.block_size // 2
    keys, prompt = random.bytes(2 * shared * KEY_BYTES), tuple(range(CROWD_TOKENS))
    known = PrefixMap(plan.blocks)
    for worker in fleet.workers:
        part = keys[: shared * KEY_BYTES]
        known.apply(worker.info.name, KvSnapshot(0, Tier.GPU, part, first=True, last=True))

    def decide(number: int) -> None:
        matches = known.matches(keys)
        asked = RouteRequest(
            str(number), prompt, ANSWER_TOKENS, number=number, keys=keys, matches=matches
        )
        route(asked, fleet, 0.0, RouteOptions(local_tokens=0))

    samples = timed(partial(decide, number) for number in range(ROUNDS))
    name = f"{CROWD_TOKENS} tokens that begin with what all hold"
    yield from latencies("decisions", name, samples, "p99 < 1 ms")


def _decide_small(plan: Plan) -> Callable[[], object]:
    """All that routing costs a request on one machine, after hashing."""
    small = replace(plan, workers=4, prompt_tokens=2048)
    random = np.random.default_rng(plan.seed)
    workers = _workers(small, random)
    names = [worker.info.name for worker in workers if worker.info.role is Role.PREFILL]
    keys, prompt, ring = (
        random.bytes(small.prompt_blocks * KEY_BYTES),
        tuple(range(2048)),
        Ring.of(names),
    )
    known, expected, attempt = _map_of(keys, names, small), ExpectedBlocks(), AttemptId("r")
    boards, fleet = boards_of(workers), FleetView(workers, ring)

    def decide() -> None:
        group = group_of(keys)
        asked = RouteRequest(
            key="r",
            prompt=prompt,
            max_tokens=ANSWER_TOKENS,
            keys=keys,
            matches=known.matches(keys),
            computing=expected.blocks(group, keys, 0),
        )
        viewed = _view_after(workers[:2], boards, fleet)
        decision = route(asked, viewed, 0.0, RouteOptions(local_tokens=0))
        expected.done(attempt)
        expected.add(attempt, group, keys, decision.chosen.worker, 0)

    return decide


def _view_after(
    changed: Sequence[WorkerView], boards: Mapping[Role, Board], before: FleetView
) -> FleetView:
    """As `Fleet` makes it, its views of single workers aside."""
    for view in changed:
        boards[view.info.role].put(view)
    pools = {role: board.pool() for role, board in boards.items()}
    return FleetView(before.workers, before.ring, pools=pools)


def _workers(plan: Plan, random: np.random.Generator) -> tuple[WorkerView, ...]:
    """Half of each kind, differently busy."""
    layout = KvLayout("benchmark", "bfloat16", 36, 8, 128, plan.block_size)
    num_blocks = 4 * plan.prompt_blocks
    views = []
    for number in range(max(plan.workers, 2)):
        role = (Role.PREFILL, Role.DECODE)[number % 2]
        info = WorkerInfo(
            name=f"worker-{number}",
            role=role,
            incarnation="1",
            address=f"worker-{number}:1",
            pid=1,
            model_name="benchmark",
            layout=layout,
            num_blocks=num_blocks,
            max_model_len=2 * plan.prompt_tokens,
            transport="loopback",
        )
        seconds = float(random.uniform(0.1, 5))
        backlog = (
            Backlog(1000, seconds, (Ahead((0, 0.0), seconds),))
            if role is Role.PREFILL
            else Backlog()
        )
        load = WorkerLoad(running=int(random.integers(1, 64)))
        views.append(WorkerView(info, WorkerState.LIVE, load, backlog=backlog))
    return tuple(views)


def _map_of(keys: bytes, names: list[str], plan: Plan) -> PrefixMap:
    known = PrefixMap(max(plan.blocks, plan.prompt_blocks))
    holders = names[:HOLDERS]
    for number, name in enumerate(holders, start=1):
        blocks = plan.prompt_blocks * number // len(holders)
        part = keys[: blocks * KEY_BYTES]
        known.apply(name, KvSnapshot(0, Tier.GPU, part, first=True, last=True))
    return known
