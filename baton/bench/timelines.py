"""What the cluster's own traces say of a load: on whom prompts fell, and where their TTFT went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.bench.stats import Outcome
from baton.client.http import Client
from baton.errors import BatonError

STAGES = ("route", "queue", "fetch", "prefill", "reply")


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


@dataclass(frozen=True, slots=True)
class Attributed:
    """The share of a request's TTFT that has a stage: of all requests that had a token."""

    requests: int
    lowest: float
    p1: float
    p50: float

    @classmethod
    def of(cls, traces: Sequence[Mapping[str, Any]]) -> Attributed | None:
        shares = sorted(t["ttft_attributed"] for t in traces if t.get("ttft_attributed"))
        if not shares:
            return None
        middle = shares[len(shares) // 2]
        return cls(len(shares), shares[0], shares[len(shares) // 100], middle)


@dataclass(frozen=True, slots=True)
class Timelines:
    """`ttft_parts`: mean seconds of a request by stage, from its arrival at the conductor until the
    first token is there: route (to the worker, with tokenizing and hashing), queue, fetch, prefill
    (steps that are shared with others count whole), reply (back to the conductor)."""

    balance: Balance
    ttft_parts: Mapping[str, float]
    attributed: Attributed | None = None  # None when the conductor does not tell


async def read_timelines(client: Client, outcomes: Sequence[Outcome]) -> Timelines | None:
    """None when the cluster has forgotten a request: it remembers the last ones only."""
    tokens: Counter[str] = Counter()
    requests: Counter[str] = Counter()
    stages: list[Mapping[str, float]] = []
    traces: list[Mapping[str, Any]] = []
    try:
        for worker in await _computing_workers(client):
            tokens[worker] += 0
        for outcome in outcomes:
            if outcome.timing is None:
                continue
            trace = await client.trace(outcome.timing.request_id)
            traces.append(trace)
            worker, usage = _worker_of(trace), outcome.timing.usage
            tokens[worker] += usage.prompt_tokens - usage.cached_tokens
            requests[worker] += 1
            if parts := ttft_parts(trace):
                stages.append(parts)
    except BatonError:
        return None
    means = {
        stage: sum(parts[stage] for parts in stages) / len(stages) for stage in STAGES if stages
    }
    return Timelines(Balance(dict(tokens), dict(requests)), means, Attributed.of(traces))


def ttft_parts(trace: Mapping[str, Any]) -> Mapping[str, float]:
    """Seconds of each stage. Empty when the last attempt did not tell all of them, or was not the
    first: what a retry cost has no stage."""
    if len(trace["attempts"]) != 1:
        return {}
    worker, spans = _worker_of(trace), trace.get("spans") or ()
    own = {span["name"]: span for span in spans if span["source"] == worker}
    first = next((span for span in spans if span["name"] == "first_token"), None)
    if first is None or not {"queue", "prefill"} <= own.keys():
        return {}
    parts = {name: own[name]["end_s"] - own[name]["start_s"] for name in own if name in STAGES}
    parts["route"] = own["queue"]["start_s"] - first["start_s"]
    parts["reply"] = first["end_s"] - own["prefill"]["end_s"]
    return {stage: parts.get(stage, 0.0) for stage in STAGES}


async def _computing_workers(client: Client) -> list[str]:
    """Those that compute prompts: prefill workers, or all where there are none."""
    workers = (await client.cluster()).get("workers") or []
    prefill = [str(worker["name"]) for worker in workers if worker.get("role") == "prefill"]
    return prefill or [str(worker["name"]) for worker in workers]


def _worker_of(trace: Mapping[str, Any]) -> str:
    last = trace["attempts"][-1]
    return str(last["prefill"] or last["decode"])
