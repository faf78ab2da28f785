"""What prefill, decode steps and transfers cost: frozen values that routing may compute with.

`conductor.cost_fit` fits them to what workers report. Until there are MIN_SAMPLES of these, a
value says that it is still a prior: good enough to compare workers with one another, not to promise
a time to anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.types.kv_events import Tier

MIN_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Seconds to compute the KV of some tokens and the first token after them.

    Products take time by the token, attention by the pair of a token and one before it: a + b·n +
    c·n·(context + n/2), for n tokens that follow `context` tokens whose KV is there.
    """

    base_s: float = 2e-3
    token_s: float = 1e-4
    pair_s: float = 1e-9
    samples: int = 0
    mean_context: float = 0.0  # tokens that an average token of the samples attended to

    @property
    def is_prior(self) -> bool:
        return self.samples < MIN_SAMPLES

    def seconds(self, tokens: int, context: int = 0) -> float:
        if tokens <= 0:
            return 0.0
        return self.base_s + self.token_s * tokens + self.pair_s * pairs(tokens, context)

    def queue_s(self, tokens: int) -> float:
        """Seconds for prompt tokens of which only the number is known."""
        return (self.token_s + self.pair_s * self.mean_context) * max(tokens, 0)


def pairs(tokens: int, context: int) -> float:
    """Pairs of a token and one that it attends to."""
    return tokens * (context + tokens / 2)


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Seconds of one decode step, which is also the TPOT, with `running` sequences in it."""

    base_s: float = 2e-2
    sequence_s: float = 2e-4
    samples: int = 0

    @property
    def is_prior(self) -> bool:
        return self.samples < MIN_SAMPLES

    def seconds(self, running: int) -> float:
        return self.base_s + self.sequence_s * max(running, 1)


@dataclass(frozen=True, slots=True)
class TransferCost:
    """Seconds to fetch bytes of KV."""

    latency_s: float
    byte_s: float
    samples: int = 0

    @property
    def is_prior(self) -> bool:
        return self.samples < MIN_SAMPLES

    def seconds(self, num_bytes: int) -> float:
        return self.latency_s + self.byte_s * num_bytes if num_bytes > 0 else 0.0


class Route(NamedTuple):
    """Where blocks come from: the tier that has them, and whether that is on the same node."""

    tier: Tier
    local: bool


# What good hardware does: another worker's pool is read by RDMA, NVLink or shared memory; a disk
# adds its own time. An untried route is believed to be fast, because one that is believed to be
# slow is never tried, and so never found out about. The first transfers put it right.
TRANSFER_PRIORS: Mapping[Route, TransferCost] = {
    Route(Tier.GPU, True): TransferCost(2e-3, 1 / 20e9),
    Route(Tier.GPU, False): TransferCost(4e-3, 1 / 20e9),
    Route(Tier.CPU, True): TransferCost(2e-3, 1 / 20e9),
    Route(Tier.CPU, False): TransferCost(4e-3, 1 / 20e9),
    Route(Tier.NVME, True): TransferCost(4e-3, 1 / 7e9),
    Route(Tier.NVME, False): TransferCost(6e-3, 1 / 7e9),
}
HANDOFF_PRIOR = TransferCost(8e-3, 1 / 4e9)


@dataclass(frozen=True, slots=True)
class TransferCosts:
    """Of the whole cluster. `handoff` is from a prefill worker's first token to its release."""

    routes: Mapping[Route, TransferCost] = field(default_factory=lambda: TRANSFER_PRIORS)
    handoff: TransferCost = HANDOFF_PRIOR

    def fetch(self, tier: Tier, local: bool) -> TransferCost:
        return self.routes[Route(tier, local)]


@dataclass(frozen=True, slots=True)
class WorkerCost:
    """Of one worker."""

    prefill: PrefillCost = PrefillCost()
    decode: DecodeCost = DecodeCost()


UNKNOWN_WORKER = WorkerCost()
UNKNOWN_TRANSFERS = TransferCosts()
