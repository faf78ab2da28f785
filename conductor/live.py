"""What the live page and `baton top` show of this conductor's requests; no prompt text is here.

Requests are counted when they end and KV when it has moved: O(1) each, and nothing per token.
What is shown is put together by `conductor.live_view`, while somebody looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from baton.types.fleet import Role
from baton.types.kv_events import Tier
from baton.types.link import FetchPart
from baton.types.request import Finish, FinishReason
from conductor.admission import Slos
from conductor.goodput import Latencies, missed_slos
from conductor.router import Decision
from conductor.window import SLOT_S, Flow, Period, Slot, Window

PERIODS_S = (60, 300)
FLOW_S = 10.0  # over which the rate of a flow is taken
MAX_FLOWS = 64  # that are shown, the largest
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_HISTORY = (
    "ttft_s",
    "tpot_s",
    "goodput_per_s",
    "hit_rate",
    "requests_per_s",
    "tokens_per_s",
)
_AFTER_PROMPT = {"handoff", "decode"}  # spans that begin when the prompt has been computed


class Live:
    """Rolling figures of one conductor. `tokens` counts what was generated, and only grows."""

    def __init__(self, tokens: Callable[[], int], slos: Slos) -> None:
        self._tokens = tokens
        self.slos = slos
        now = _now()
        self._window = Window(now)
        self._seen = (now, tokens())  # when the tokens were last looked at
        self._past: dict[int, dict[str, float]] = {}  # the history, by slot
        self._closed = asyncio.Event()

    # -- hearing -------------------------------------------------------------------------------

    def note_begin(self) -> None:
        """A request begins: what was generated until now had other causes."""
        self._look(_now())

    def note_end(self, outcome: str, latencies: Latencies) -> None:
        """A request has ended."""
        now = _now()
        self._look(now)
        slot = self._window.current(now)
        slot.requests += 1
        slot.failed += outcome != "ok"
        slot.good += outcome == "ok" and not missed_slos(latencies, self.slos)
        if latencies.ttft_s is not None:
            slot.ttft.add(latencies.ttft_s)
        if latencies.worst_tpot_s is not None:
            slot.tpot.add(latencies.worst_tpot_s)

    def note_finish(
        self, decision: Decision, prompt_tokens: int, duty: Role, finish: Finish
    ) -> None:
        """A worker is done with an attempt: where the KV of its context came from and went to."""
        computes = decision.prefill is None or duty is Role.PREFILL
        if not computes or not _AFTER_PROMPT & {span.name for span in finish.spans}:
            return
        now, layout = _now(), decision.decode.info.layout
        slot, worker = self._window.current(now), decision.prefill or decision.decode
        name = worker.info.name
        plan = decision.fetch_plan
        fetched = [fetched_tokens(part, finish, layout.block_size) for part in plan]
        for part, tokens in zip(plan, fetched, strict=True):
            slot.hits[_place(part)] += tokens
            if tokens:
                blocks = layout.blocks_for(tokens)
                flow = Flow(part.source.name, name, "fetch")
                slot.add_flow(flow, blocks * layout.block_bytes)
        slot.prompt_tokens += prompt_tokens
        slot.hits["own"] += finish.cached_tokens - sum(fetched)
        if finish.reason is FinishReason.HANDED_OFF:
            num_bytes = layout.blocks_for(prompt_tokens) * layout.block_bytes
            slot.add_flow(Flow(name, decision.decode.info.name, "handoff"), num_bytes)

    def note_offers(self, worker: str, store: str, num_bytes: int) -> None:
        """A node's store has read that much of what a worker offered it."""
        self._window.current(_now()).add_flow(Flow(worker, store, "offer"), num_bytes)

    # -- telling -------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """The figures of each period, those of the last seconds, and their history."""
        now = _now()
        self._look(now)
        recent = self._window.last(now, 2 * SLOT_S)
        return {
            "slos": {"ttft_s": self.slos.ttft_s, "tpot_s": self.slos.tpot_s},
            "now": {
                "requests_per_s": round(recent.rate("requests"), 3),
                "tokens_per_s": round(recent.rate("tokens"), 1),
            },
            "periods": [
                {"period_s": seconds, **self._period(self._window.last(now, seconds))}
                for seconds in PERIODS_S
            ],
            "history": self._history(list(self._window.history(now))),
        }

    def flows(self) -> list[dict[str, Any]]:
        """KV between members of the fleet in the last minute, most bytes first."""
        now = _now()
        recent = self._window.last(now, FLOW_S)
        lately = recent.flows()
        minute = self._window.last(now, 60).flows()
        return [
            {**flow._asdict(), "bytes": num_bytes, "bytes_per_s": lately[flow] / recent.seconds}
            for flow, num_bytes in minute.most_common(MAX_FLOWS)
        ]

    # -- ending --------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Let everybody who watches go: the process is about to end."""
        self._closed.set()

    async def wait_closed(self, seconds: float) -> None:
        """Until then, or for so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return

    # -- inside --------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        since, before = self._seen
        self._seen = now, self._tokens()
        self._window.spread_tokens(self._seen[1] - before, since, now)

    def _period(self, period: Period) -> dict[str, Any]:
        return {
            "requests": int(period.total("requests")),
            "failed": int(period.total("failed")),
            "requests_per_s": round(period.rate("requests"), 3),
            "tokens_per_s": round(period.rate("tokens"), 1),
            "goodput_per_s": round(period.rate("good"), 3) if self._has_slos else None,
            "prompt_tokens": int(period.total("prompt_tokens")),
            "hits": dict(period.hits()),
            "ttft_s": _percentiles(period.ttft().quantiles(_SHARES.values())),
            "tpot_s": _percentiles(period.tpot().quantiles(_SHARES.values())),
        }

    @property
    def _has_slos(self) -> bool:
        return self.slos.ttft_s is not None or self.slos.tpot_s is not None

    def _history(self, slots: Sequence[Slot | None]) -> dict[str, Any]:
        """One value for each slot; None where there is none. What a slot comes to is kept: it
        does not change any more."""
        before, self._past = self._past, {}
        for slot in slots:
            if slot is not None:
                self._past[slot.number] = before.get(slot.number) or self._point(slot)
        points = [self._past[slot.number] if slot is not None else {} for slot in slots]
        values = {name: [point.get(name) for point in points] for name in _HISTORY}
        return {"slot_s": SLOT_S, **values}

    def _point(self, slot: Slot) -> dict[str, float]:
        """The values that there are."""
        found = {
            "ttft_s": next(iter(slot.ttft.quantiles([0.5])), None),
            "tpot_s": next(iter(slot.tpot.quantiles([0.5])), None),
            "goodput_per_s": slot.good / SLOT_S if self._has_slos else None,
            "hit_rate": slot.hits.total() / slot.prompt_tokens if slot.prompt_tokens else None,
            "requests_per_s": slot.requests / SLOT_S,
            "tokens_per_s": slot.tokens / SLOT_S,
        }
        return {name: round(value, 5) for name, value in found.items() if value is not None}


def fetched_tokens(part: FetchPart, finish: Finish, block_size: int) -> int:
    """Tokens of a part of the fetch plan whose KV was not computed: as far as it came."""
    first = part.first_block * block_size
    end = first + part.num_blocks * block_size
    return max(min(finish.cached_tokens, end) - first, 0)


def _place(part: FetchPart) -> str:
    """Where fetched KV was: in another worker's pool, or in a tier of a store."""
    return "peer" if part.tier is Tier.GPU else part.tier.value


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {name: round(value, 6) for name, value in zip(_SHARES, values, strict=True)}


def _now() -> float:
    return asyncio.get_running_loop().time()
