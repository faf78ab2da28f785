"""How evenly the work of computing prompts fell on the workers, from the cluster's own traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.bench.stats import Outcome
from baton.client.http import Client
from baton.errors import BatonError


@dataclass(frozen=True, slots=True)
class Balance:
    """`tokens`: prompt tokens that each worker computed, cached ones left out."""

    tokens: Mapping[str, int]
    requests: Mapping[str, int]

    @property
    def max_to_mean(self) -> float:
        """1 is even; the number of workers is the worst."""
        loads = list(self.tokens.values())
        total = sum(loads)
        return max(loads) * len(loads) / total if total else 1.0


async def measure_balance(client: Client, outcomes: Sequence[Outcome]) -> Balance | None:
    """None when the cluster has forgotten a request: it remembers the last ones only."""
    tokens: Counter[str] = Counter()
    requests: Counter[str] = Counter()
    try:
        for worker in await _computing_workers(client):
            tokens[worker] += 0
        for outcome in outcomes:
            if outcome.timing is not None:
                worker = _worker_of(await client.trace(outcome.timing.request_id))
                usage = outcome.timing.usage
                tokens[worker] += usage.prompt_tokens - usage.cached_tokens
                requests[worker] += 1
    except BatonError:
        return None
    return Balance(dict(tokens), dict(requests))


async def _computing_workers(client: Client) -> list[str]:
    """Those that compute prompts: prefill workers, or all where there are none."""
    workers = (await client.cluster()).get("workers") or []
    prefill = [str(worker["name"]) for worker in workers if worker.get("role") == "prefill"]
    return prefill or [str(worker["name"]) for worker in workers]


def _worker_of(trace: Mapping[str, Any]) -> str:
    last = trace["attempts"][-1]
    return str(last["prefill"] or last["decode"])
