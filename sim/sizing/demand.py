"""How many workers a trace keeps busy, without simulating it: where a search begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sim.costs.compute import Prefill, StepCost
from sim.workload.trace import BLOCK_TOKENS, Request, blocks_of


@dataclass(frozen=True, slots=True)
class Demand:
    """Workers' work, as an average over the trace: 1.7 keeps one busy and another one at 70 %.

    Every prefix that was ever computed is reused, and every decode step is as full as the SLO of
    TBT and the memory allow: no fleet needs less for the whole trace.
    """

    prefill: float
    decode: float
    batch: int  # sequences of such a step
    kv_bound: bool  # the memory, and not the SLO, bounds it

    @property
    def workers(self) -> tuple[int, int]:
        """At least one of each."""
        return max(1, math.ceil(self.prefill)), max(1, math.ceil(self.decode))


@dataclass(frozen=True, slots=True)
class Machine:
    """One worker."""

    cost: StepCost
    kv_blocks: int
    max_seqs: int


def demand(requests: Sequence[Request], machine: Machine, ttft_s: float, tbt_s: float) -> Demand:
    """`requests` in order of arrival, at least one. The last prompt has `ttft_s` to be computed."""
    span_s = requests[-1].at_s - requests[0].at_s + ttft_s
    batch, kv_bound = _batch(requests, machine, tbt_s)
    tokens = sum(max(request.output_tokens - 1, 0) for request in requests)
    decode_s = tokens * machine.cost.seconds((), [_context(requests)] * batch) / batch
    return Demand(_prefill_s(requests, machine.cost) / span_s, decode_s / span_s, batch, kv_bound)


def _prefill_s(requests: Sequence[Request], cost: StepCost) -> float:
    seen: set[int] = set()
    total_s = 0.0
    for request in requests:
        hits = next((n for n, b in enumerate(request.blocks) if b not in seen), len(request.blocks))
        context = min(hits * BLOCK_TOKENS, request.input_tokens - 1)
        total_s += cost.seconds([Prefill(request.input_tokens - context, context)], ())
        seen.update(request.blocks)
    return total_s


def _batch(requests: Sequence[Request], machine: Machine, tbt_s: float) -> tuple[int, bool]:
    """The largest that keeps the SLO and fits, and whether it is the room that ends it."""
    context = _context(requests)
    tokens = sum(request.output_tokens for request in requests)
    held = sum(r.output_tokens * blocks_of(r.input_tokens + r.output_tokens) for r in requests)
    room = max(1, int(machine.kv_blocks * tokens / held))
    most = min(room, machine.max_seqs)
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if machine.cost.seconds((), [context] * middle) <= tbt_s:
            low = middle
        else:
            high = middle - 1
    return low, low == room


def _context(requests: Sequence[Request]) -> int:
    """Of the mean decoded token."""
    tokens = sum(request.output_tokens for request in requests)
    of_all = sum(r.output_tokens * (r.input_tokens + r.output_tokens / 2) for r in requests)
    return round(of_all / tokens)
