"""A cluster in virtual time, to see what routing makes of a load that one machine cannot carry.

    session ──ask──> route ──> line of a prefill worker ──> first token ──> answer ──> next turn

Routing is the conductor's own, with its prefix map and backlogs. Workers are modelled: a prefill
worker computes one prompt after another, fetches what the plan names, and keeps every block; costs
are those that routing knows. Nothing here waits or reads a clock.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from baton.bench.ideal import InfiniteCache
from baton.bench.load import poisson_arrivals
from baton.bench.sessions import Session
from baton.hashing import block_keys, root_key
from baton.types.fleet import KvLayout, Role, WorkerInfo, WorkerLoad, WorkerState
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.types.link import FetchPart
from baton.types.request import AttemptId
from conductor.backlog import PromptQueue
from conductor.cost_model import (
    TRANSFER_PRIORS,
    DecodeCost,
    PrefillCost,
    TransferCost,
    TransferCosts,
    WorkerCost,
)
from conductor.expected import ExpectedBlocks
from conductor.prefix_map import PrefixMap
from conductor.ring import Ring
from conductor.router import RouteOptions, RouteRequest, group_of, route
from conductor.views import FleetView, WorkerView

BLOCK = 32
TPOT_S = 0.015
# About those of the small shape of `bench/` on one core of a Zen 4.
COST = WorkerCost(PrefillCost(3e-3, 6e-4, 2e-8, 99), DecodeCost(TPOT_S, 0.0, 99))
TRANSFERS = TransferCosts({path: TransferCost(3e-3, 1 / 3e9, 99) for path in TRANSFER_PRIORS})
_LAYOUT = KvLayout("modelled", "bfloat16", 8, 2, 64, BLOCK)
_ROOM = 1 << 20  # blocks of a pool: nothing is evicted


@dataclass(slots=True)
class Result:
    """`computed`: prompt tokens by prefill worker; `ideal_tokens`: what a cache without bounds that
    all share would have found of the prompts."""

    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    ideal_tokens: int = 0
    computed: dict[str, int] = field(default_factory=dict)

    @property
    def mean_ttft_s(self) -> float:
        return sum(self.ttft_s) / len(self.ttft_s)

    @property
    def cached_of_ideal(self) -> float:
        return (self.prompt_tokens - sum(self.computed.values())) / self.ideal_tokens

    @property
    def balance(self) -> float:
        """Load of the busiest over the mean."""
        loads = self.computed.values()
        return max(loads) * len(loads) / sum(loads)


@dataclass(slots=True)
class _Worker:
    info: WorkerInfo
    queue: PromptQueue = field(default_factory=PromptQueue)
    line: deque[_Prompt] = field(default_factory=deque)
    busy: bool = False
    blocks: set[bytes] = field(default_factory=set)
    sequences: int = 0
    news: int = 1  # number of the next message to the prefix map

    def view(self, now: float) -> WorkerView:
        load = WorkerLoad(running=self.sequences)
        backlog = self.queue.snapshot(now)
        return WorkerView(
            self.info, WorkerState.LIVE, load, self.sequences, backlog, COST, seen_at=now
        )


@dataclass(slots=True)
class _Talk:
    session: Session
    said: list[int] = field(default_factory=list)
    turn: int = 0


@dataclass(frozen=True, slots=True)
class _Prompt:
    talk: _Talk
    attempt: AttemptId
    tokens: int
    keys: tuple[bytes, ...]
    fetch: tuple[FetchPart, ...]
    decode: str
    max_tokens: int
    asked_at: float


class ModelledCluster:
    """For one run of one load."""

    def __init__(self, prefill: int, decode: int, options: RouteOptions) -> None:
        counts = {Role.PREFILL: prefill, Role.DECODE: decode}
        infos = [_info(role, n) for role, count in counts.items() for n in range(count)]
        self._workers = {info.name: _Worker(info) for info in infos}
        self._options = options
        prefillers = [info.name for info in infos if info.role is Role.PREFILL]
        self._ring = Ring.of(prefillers)
        self._map = PrefixMap(_ROOM)
        for name in self._workers:
            self._map.apply(name, KvSnapshot(0, Tier.GPU, b"", first=True, last=True))
        self._expected = ExpectedBlocks()
        self._ideal = InfiniteCache(BLOCK)
        self._root = root_key("modelled", "", BLOCK)
        self._now = 0.0
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._result = Result(computed=dict.fromkeys(prefillers, 0))

    def run(self, sessions: Sequence[Session], rate_per_s: float, seed: int) -> Result:
        """Sessions arrive as a Poisson process; each turn follows the answer before it at once."""
        for session, at_s in zip(sessions, poisson_arrivals(rate_per_s, seed), strict=False):
            self._at(at_s, partial(self._ask, _Talk(session)))
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            event()
        return self._result

    def _at(self, when_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), event))

    def _ask(self, talk: _Talk) -> None:
        turn = talk.session.turns[talk.turn]
        talk.turn += 1
        talk.said += turn.tokens
        self._result.prompt_tokens += len(talk.said)
        self._result.ideal_tokens += self._ideal.expect(talk.said)
        keys = tuple(block_keys(self._root, talk.said, BLOCK))
        joined, number = b"".join(keys), next(self._numbers)
        group = group_of(joined)
        asked = RouteRequest(
            key=str(number),
            prompt=tuple(talk.said),
            max_tokens=turn.max_tokens,
            number=number,
            keys=joined,
            matches=self._map.matches(joined),
            computing=self._expected.blocks(group, joined, 0),
        )
        views = tuple(worker.view(self._now) for worker in self._workers.values())
        fleet = FleetView(views, self._ring, TRANSFERS)
        decision = route(asked, fleet, self._now, self._options)
        attempt, name = AttemptId(asked.key), decision.chosen.worker
        prompt = _Prompt(
            talk,
            attempt,
            len(talk.said),
            keys,
            decision.fetch_plan,
            decision.decode.info.name,
            turn.max_tokens,
            self._now,
        )
        worker = self._workers[name]
        worker.queue.add(attempt, prompt.tokens, decision.work_s, (0, self._now), self._now)
        self._expected.add(attempt, group, joined, name, 0)
        for busier in (worker, self._workers[prompt.decode]):
            busier.sequences += 1
        worker.line.append(prompt)
        self._begin(worker)

    def _begin(self, worker: _Worker) -> None:
        if not worker.busy and worker.line:
            worker.busy = True
            prompt = worker.line.popleft()
            done_at = self._now + self._compute(worker, prompt)
            self._at(done_at, partial(self._computed, worker, prompt))

    def _compute(self, worker: _Worker, prompt: _Prompt) -> float:
        """Seconds that it takes, with what the worker has by now."""
        usable = (prompt.tokens - 1) // BLOCK
        own = sum(1 for _ in itertools.takewhile(worker.blocks.__contains__, prompt.keys[:usable]))
        fetch_s = 0.0
        for part in prompt.fetch:
            end = part.first_block + part.num_blocks
            if part.first_block <= own < end:
                cost = TRANSFERS.fetch(part.tier, local=True)
                fetch_s += cost.seconds((end - own) * _LAYOUT.block_bytes)
                own = end
        rest = prompt.tokens - own * BLOCK
        self._result.computed[worker.info.name] += rest
        return fetch_s + COST.prefill.seconds(rest, own * BLOCK)

    def _computed(self, worker: _Worker, prompt: _Prompt) -> None:
        self._result.ttft_s.append(self._now - prompt.asked_at)
        worker.busy = False
        worker.sequences -= 1
        worker.queue.done(prompt.attempt, self._now)
        self._learn(worker, prompt.keys)
        self._expected.done(prompt.attempt)
        self._at(self._now + TPOT_S * prompt.max_tokens, partial(self._answered, prompt))
        self._begin(worker)

    def _answered(self, prompt: _Prompt) -> None:
        talk, decoder = prompt.talk, self._workers[prompt.decode]
        decoder.sequences -= 1
        talk.said += [next(self._numbers) for _ in range(prompt.max_tokens)]
        self._ideal.learn(talk.said)
        self._learn(decoder, block_keys(self._root, talk.said[:-1], BLOCK))
        if talk.turn < len(talk.session.turns):
            self._ask(talk)

    def _learn(self, worker: _Worker, keys: Sequence[bytes]) -> None:
        new = [key for key in keys if key not in worker.blocks]
        if new:
            worker.blocks.update(new)
            message = KvEvents(worker.news, Tier.GPU, b"".join(new), b"")
            self._map.apply(worker.info.name, message)
            worker.news += 1


def _info(role: Role, number: int) -> WorkerInfo:
    name = f"{role.value}-{number}"
    return WorkerInfo(
        name=name,
        role=role,
        incarnation="1",
        address=name,
        pid=1,
        model_name="modelled",
        layout=_LAYOUT,
        num_blocks=_ROOM,
        max_model_len=_ROOM,
        transport="loopback",
        node="node",
    )
