"""What routing sees: frozen views of the workers, and of the fleet, at one moment.

A fleet has up to thousands of workers and is looked at for every request, so each view carries what
a scan over all of them compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.types.fleet import BlockState, Peer, Role, WorkerInfo, WorkerLoad, WorkerState
from conductor.backlog import EMPTY, Backlog
from conductor.cost_model import UNKNOWN_TRANSFERS, UNKNOWN_WORKER, TransferCosts, WorkerCost
from conductor.ring import Ring

DecodeLoad = tuple[int, int]
_USED = frozenset({BlockState.ACTIVE, BlockState.LEASED, BlockState.QUARANTINED})


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker (or store) at one moment.

    `own_attempts` and `backlog` count what this conductor has sent and not seen end; `backlog` only
    the prompts that have no first token yet, `own_decoding` only what the worker decodes and has
    sent tokens of. `seen_at` is the loop time of this view.
    """

    info: WorkerInfo
    state: WorkerState
    load: WorkerLoad
    own_attempts: int = 0
    own_decoding: int = field(default=0, kw_only=True)
    backlog: Backlog = EMPTY
    cost: WorkerCost = UNKNOWN_WORKER
    seen_at: float = 0.0
    foreign_s: float = field(init=False)  # prompts of which only the worker's report tells
    free_at: float = field(init=False)  # loop time by which all prompts should be computed
    sequences: int = field(init=False)
    capacity: int = field(init=False)  # tokens of the longest sequence that can ever fit
    free_blocks: int = field(init=False)  # free, or cached and evictable
    decode_load: DecodeLoad = field(init=False)
    tpot_s: float = field(init=False)  # predicted, when one more sequence joins

    def __post_init__(self) -> None:
        load, info, free_at = self.load, self.info, self.backlog.free_at
        foreign, foreign_s = load.waiting_tokens - self.backlog.tokens, 0.0
        if foreign > 0:
            foreign_s = self.cost.prefill.queue_s(foreign)
            free_at = max(free_at, self.seen_at) + foreign_s
        used = 0
        for state, count in load.blocks:
            if state in _USED:
                used += count
        sequences = max(load.running + load.waiting, self.own_attempts)
        derive = object.__setattr__  # one by one: views are made for every request
        derive(self, "foreign_s", foreign_s)
        derive(self, "free_at", free_at)
        derive(self, "sequences", sequences)
        derive(self, "capacity", min(info.max_model_len, info.num_blocks * info.layout.block_size))
        derive(self, "free_blocks", max(info.num_blocks - used, 0))
        # In sixteenths, so that pools that are nearly as full tie.
        derive(self, "decode_load", (sequences, 16 * used // max(info.num_blocks, 1)))
        derive(self, "tpot_s", self.cost.decode.seconds(sequences + 1))

    @property
    def peer(self) -> Peer:
        return Peer(self.info.name, self.info.incarnation, self.info.address)

    @property
    def own_prompt_tokens(self) -> int:
        return self.backlog.tokens

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens still to be computed. Our own count is fresher, the report sees others."""
        return max(self.load.waiting_tokens, self.backlog.tokens)

    def queue_s(self, now: float, priority: int = 0) -> float:
        """Seconds until a prompt of `priority` that arrives now would begin to be computed."""
        return self.backlog.ahead_s(now, priority) + self.foreign_s


@dataclass(frozen=True, slots=True)
class FleetView:
    """`ring` is over the live prefill workers, or without these over the decode workers; None when
    there are none. `ttft_factor` is what estimates of TTFT have lately had to be multiplied by."""

    workers: tuple[WorkerView, ...]
    ring: Ring | None = None
    transfers: TransferCosts = UNKNOWN_TRANSFERS
    ttft_factor: float = 1.0
    _live: Mapping[Role, tuple[WorkerView, ...]] = field(init=False, repr=False, compare=False)
    _by_name: dict[str, WorkerView] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        live: dict[Role, list[WorkerView]] = {role: [] for role in Role}
        for worker in self.workers:
            if worker.state is WorkerState.LIVE:
                live[worker.info.role].append(worker)
        object.__setattr__(self, "_live", {role: tuple(some) for role, some in live.items()})
        object.__setattr__(self, "_by_name", {})

    def live(self, role: Role) -> tuple[WorkerView, ...]:
        return self._live[role]

    def find(self, name: str) -> WorkerView | None:
        """The live worker or store of that name."""
        if not self._by_name:  # only few requests need it
            self._by_name.update((worker.info.name, worker) for worker in self.workers)
        found = self._by_name.get(name)
        return found if found is not None and found.state is WorkerState.LIVE else None
