"""Which workers serve an answer: a pure function of the request, the fleet and the clock.

Every decision carries its reasons. `fetch_plan` says which cached blocks the workers should fetch
from where; it is empty as long as no prefix map feeds the router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from baton.errors import NoWorker
from baton.types.fleet import BlockState, Peer, Role, WorkerInfo, WorkerLoad, WorkerState


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker at one moment. `own_*` count what this conductor has sent and not seen end."""

    info: WorkerInfo
    state: WorkerState
    load: WorkerLoad
    own_attempts: int = 0
    own_prompt_tokens: int = 0

    @property
    def peer(self) -> Peer:
        return Peer(self.info.name, self.info.incarnation, self.info.address)

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence that can ever fit."""
        return min(self.info.max_model_len, self.info.num_blocks * self.info.layout.block_size)


@dataclass(frozen=True, slots=True)
class FleetView:
    workers: tuple[WorkerView, ...]

    def live(self, role: Role) -> tuple[WorkerView, ...]:
        return tuple(
            worker
            for worker in self.workers
            if worker.state is WorkerState.LIVE and worker.info.role is role
        )


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What routing may depend on. `avoid` names workers that have just failed this request."""

    key: str
    prompt: tuple[int, ...]
    max_tokens: int
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Fetch:
    """Blocks that `worker` should fetch from `source` instead of computing them."""

    worker: str
    source: str
    tier: str
    block_keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """`prefill` is None when the decode worker computes the prompt itself."""

    prefill: WorkerView | None
    decode: WorkerView
    reasons: tuple[str, ...]
    fetch_plan: tuple[Fetch, ...] = ()


def route(request: RouteRequest, fleet: FleetView, now: float) -> Decision:
    """Choose the least loaded pair that has room. Raises NoWorker, which says what is missing.

    `now` is the loop's time; nothing depends on it as long as loads are taken as they were last
    reported.
    """
    total = len(request.prompt) + request.max_tokens
    decode = _choose(request, fleet.live(Role.DECODE), total, _decode_load)
    if decode is None:
        raise NoWorker(_why_none(fleet))
    reasons = [f"decode {decode.info.name}: {_describe(decode)}"]
    prefill = _choose(request, fleet.live(Role.PREFILL), len(request.prompt) + 1, _prefill_load)
    if prefill is None:
        reasons.append("no live prefill worker has room: the decode worker computes the prompt")
    else:
        reasons.append(f"prefill {prefill.info.name}: {_describe(prefill)}")
    return Decision(prefill, decode, tuple(reasons))


Load = tuple[int, ...]


def _choose(
    request: RouteRequest,
    workers: Sequence[WorkerView],
    tokens: int,
    load_of: Callable[[WorkerView], Load],
) -> WorkerView | None:
    fitting = [worker for worker in workers if worker.capacity >= tokens]
    preferred = [worker for worker in fitting if worker.info.name not in request.avoid] or fitting
    if not preferred:
        return None
    least = min(load_of(worker) for worker in preferred)
    tied = sorted(
        (worker for worker in preferred if load_of(worker) == least),
        key=lambda worker: worker.info.name,
    )
    return tied[xxhash.xxh3_64_intdigest(request.key.encode()) % len(tied)]


def _prefill_load(worker: WorkerView) -> Load:
    """Prompt tokens still to be computed. Our own count is fresher, the report sees others."""
    return (max(worker.load.waiting_tokens, worker.own_prompt_tokens),)


def _decode_load(worker: WorkerView) -> Load:
    """Sequences first, then how full the pool is in sixteenths, so that close loads tie."""
    sequences = max(worker.load.running + worker.load.waiting, worker.own_attempts)
    used = worker.load.blocks_in(BlockState.ACTIVE, BlockState.LEASED, BlockState.QUARANTINED)
    return (sequences, 16 * used // max(worker.info.num_blocks, 1))


def _describe(worker: WorkerView) -> str:
    load = worker.load
    return (
        f"running={load.running} waiting={load.waiting} waiting_tokens={load.waiting_tokens} "
        f"own={worker.own_attempts}"
    )


def _why_none(fleet: FleetView) -> str:
    decoders = [worker for worker in fleet.workers if worker.info.role is Role.DECODE]
    if not decoders:
        return "no decode worker has registered: start one with --conductor pointing here"
    states = ", ".join(f"{worker.info.name} is {worker.state}" for worker in decoders)
    return f"no decode worker can take this request now: {states}"
