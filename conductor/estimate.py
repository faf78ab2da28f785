"""Predicted TTFT of one prompt at one worker, and which blocks it should fetch for that.

    TTFT = queue + transfer of what others hold of the prefix + prefill of the rest

(Mooncake, FAST'25, Algorithm 1). The plan is the cheapest of: fetch nothing, or more and more of
the prefix, each stretch from the fastest source that has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from baton.types.fleet import KvLayout
from baton.types.kv_events import Tier
from baton.types.link import FetchPart
from conductor.cost_model import TransferCost, TransferCosts
from conductor.matches import Matches
from conductor.own_blocks import Crowd, OwnBlocks
from conductor.views import FleetView, Pool, WorkerView

# Mooncake's kvcache_balancing_threshold. Theirs compares lengths of matches; ours the prefill times
# without and with the transfer, because behind a long context few blocks are much work.
BALANCING_THRESHOLD = 1.1
NOTHING: Mapping[str, int] = MappingProxyType({})
DUE_S = 28.0  # nobody overtakes a prompt that would have its first token later than that
OVERTAKEN = 3.0  # what a second of waiting counts for those that did not expect it
MAX_SOURCES = 8  # holders of the longest matches that a plan may use


class Fetch(StrEnum):
    """From whom a worker may fetch what it lacks of a prefix."""

    NOBODY = "nobody"
    NODE = "node"  # its node's store, and workers on its node
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that was considered to compute the prompt, and what was expected of it.

    `cached_tokens` are in its own pool, the last `expected_tokens` of them once it has computed
    the prompts before this one; `fetch_tokens` come from others before it computes the rest. It is
    due `slack_s` after it comes, before `behind` prompts that are there already.
    """

    worker: str
    why: str
    queue_s: float
    fetch_s: float
    prefill_s: float
    cached_tokens: int = 0
    fetch_tokens: int = 0
    expected_tokens: int = 0
    slack_s: float = 0.0
    behind: int = 0

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.fetch_s + self.prefill_s

    @property
    def cost_s(self) -> float:
        """What it adds to all first tokens together: its own time, and that of those behind it."""
        return self.ttft_s + OVERTAKEN * self.behind * (self.fetch_s + self.prefill_s)

    def describe(self) -> str:
        parts = [f"queue {describe_s(self.queue_s)}"]
        if self.fetch_tokens:
            parts.append(f"fetch {self.fetch_tokens} tokens {describe_s(self.fetch_s)}")
        parts.append(f"prefill {describe_s(self.prefill_s)}")
        cached = f", {self.cached_tokens} tokens cached" if self.cached_tokens else ""
        if self.expected_tokens:
            cached += f", {self.expected_tokens} of them by then"
        return f"{' + '.join(parts)} = {describe_s(self.ttft_s)}{cached}"


class Arrival(NamedTuple):
    """Of a prompt. `patience`: for how many seconds others may overtake it, per second of work."""

    now: float
    priority: int = 0
    patience: float = 0.0


class Source(NamedTuple):
    """Somebody who holds the first `blocks` blocks of the prompt and lends them."""

    holder: WorkerView
    tier: Tier
    blocks: int


class _Stretch(NamedTuple):
    source: Source
    first: int  # block
    end: int
    cost: TransferCost


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the cluster holds of a prompt: `own` in workers' pools, `sources` to fetch from.

    The last `expected` blocks of `own` are in prompts that the worker has yet to compute, before
    this one; nobody can fetch these. Counts are in blocks; the prompt's last token is never among
    them, because somebody has to compute what follows it. With `near_only`, a worker may use the
    sources on its own node.
    """

    prompt_tokens: int
    own: OwnBlocks
    sources: tuple[Source, ...] = ()
    expected: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    near_only: bool = False

    def longest(self, workers: Pool, count: int) -> Sequence[WorkerView]:
        """Those of `workers` with the longest matches, the longest first."""
        return workers.most(self.own.within(workers), count)

    def limited(self, fetch: Fetch) -> Prefix:
        """The same, where that is allowed."""
        if fetch is Fetch.CLUSTER:
            return self
        sources = self.sources if fetch is Fetch.NODE else ()
        return replace(self, sources=sources, near_only=True)


def find_prefix(
    prompt_tokens: int,
    layout: KvLayout,
    matches: Matches,
    fleet: FleetView,
    avoid: frozenset[str] = frozenset(),
    computing: Mapping[str, int] = NOTHING,
) -> Prefix:
    """`matches` of live holders, as far as they can be used; nothing is fetched from those to
    avoid. `computing`: blocks in prompts that workers have been given, by name."""
    usable = (prompt_tokens - 1) // layout.block_size
    if usable < 1:
        return Prefix(prompt_tokens, OwnBlocks({}))
    few: dict[str, int] = {}
    sources: list[Source] = []
    crowd = None
    if matches.is_crowd:
        crowd = Crowd(matches.roster, np.minimum(matches.lengths(), usable))
    for match in matches:
        holder = fleet.find(match.holder)
        if holder is None:
            continue
        blocks = min(match.blocks, usable)
        few[match.holder] = max(blocks, few.get(match.holder, 0))
        if len(sources) < MAX_SOURCES and match.holder not in avoid:
            sources.append(Source(holder, match.tier, blocks))
            if crowd is not None and len(sources) == MAX_SOURCES:
                break  # the others are counted
    own, expected = OwnBlocks(few, crowd), {}
    for name, blocks in computing.items():
        known = own.of(name)
        if min(blocks, usable) > known and fleet.find(name) is not None:
            few[name] = min(blocks, usable)
            expected[name] = few[name] - known
    return Prefix(prompt_tokens, own, tuple(sources), expected)


def estimate(
    worker: WorkerView,
    prefix: Prefix,
    transfers: TransferCosts,
    arrival: Arrival,
    why: str = "",
) -> tuple[Candidate, tuple[FetchPart, ...]]:
    """What to expect of `worker`, and what it should fetch for that."""
    size = worker.info.layout.block_size
    own = prefix.own.of(worker.info.name)
    cost = worker.cost.prefill
    prompt = prefix.prompt_tokens
    alone_s = best_s = cost.seconds(prompt - own * size, own * size)
    stretches = _stretches(worker, own, prefix, transfers) if prefix.sources else []
    used, best_fetch_s, fetch_s = 0, 0.0, 0.0
    for number, stretch in enumerate(stretches, start=1):
        num_bytes = (stretch.end - stretch.first) * worker.info.layout.block_bytes
        fetch_s += stretch.cost.seconds(num_bytes)
        total_s = fetch_s + cost.seconds(prompt - stretch.end * size, stretch.end * size)
        if total_s < best_s and alone_s > BALANCING_THRESHOLD * total_s:
            used, best_s, best_fetch_s = number, total_s, fetch_s
    expected = prefix.expected.get(worker.info.name, 0)
    # Not less for what is expected: if it overtakes that prompt, it has to compute it itself.
    work_s = best_s if not expected else cost.seconds(prompt - (own - expected) * size)
    slack_s = _slack_s(worker, arrival, work_s)
    turn = (arrival.priority, arrival.now + slack_s)
    parts = tuple(_part(stretch) for stretch in stretches[:used])
    candidate = Candidate(
        worker=worker.info.name,
        why=why,
        queue_s=worker.queue_s(arrival.now, turn),
        fetch_s=best_fetch_s,
        prefill_s=best_s - best_fetch_s,
        cached_tokens=own * size,
        fetch_tokens=(stretches[used - 1].end - own) * size if used else 0,
        expected_tokens=expected * size,
        slack_s=slack_s,
        behind=worker.backlog.behind(turn),
    )
    return candidate, parts


def _slack_s(worker: WorkerView, arrival: Arrival, work_s: float) -> float:
    """For how many seconds prompts that come later may go first: in proportion to its work, as far
    as it can still be done in `DUE_S` behind those that wait already."""
    if not arrival.patience:
        return 0.0
    in_turn_s = worker.queue_s(arrival.now, (arrival.priority, arrival.now)) + work_s
    return max(min(arrival.patience * work_s, DUE_S - in_turn_s), 0.0)


def _stretches(
    worker: WorkerView, own: int, prefix: Prefix, transfers: TransferCosts
) -> list[_Stretch]:
    """The prefix after the worker's own blocks, cut so that the fastest sources give what they
    can."""
    offers = [
        (transfers.fetch(source.tier, near(worker, source.holder)), source)
        for source in prefix.sources
        if source.blocks > own
        and source.holder.info.name != worker.info.name
        and (not prefix.near_only or near(worker, source.holder))
    ]
    # Ties go to the longest, then to the less busy holder: reading slows it down a little.
    offers.sort(key=lambda offer: (offer[0].byte_s, -offer[1].blocks, offer[1].holder.sequences))
    stretches, reached = [], own
    for cost, source in offers:
        if source.blocks > reached:
            stretches.append(_Stretch(source, reached, source.blocks, cost))
            reached = source.blocks
    return stretches


def near(worker: WorkerView, holder: WorkerView) -> bool:
    """Whether both are on the same node, as far as they say where they are."""
    return bool(worker.info.node) and worker.info.node == holder.info.node


def _part(stretch: _Stretch) -> FetchPart:
    source = stretch.source
    return FetchPart(source.holder.peer, stretch.first, stretch.end - stretch.first, source.tier)


def describe_s(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
