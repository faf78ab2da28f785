"""Clients that ask when their trace says so, however slow the answers are, and what they see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from itertools import pairwise
from typing import Protocol

from baton.bench.stats import percentile
from baton.errors import BatonError
from conductor.dispatch import Usage
from conductor.request import Ask, Options
from conductor.service import Conductor
from conductor.trace import Timeline
from sim.fleet.device import TICK_S
from sim.fleet.prompts import Prompts
from sim.fleet.records import OK, Record
from sim.workload.trace import Request

_GAPS = tuple(f"tbt_{name}_s" for name in ("mean", "p50", "p90", "p99", "worst", "max"))


class Front(Protocol):
    """What a request takes before it is the conductor's, and its tokens after they were."""

    async def ask(self, tokens: int) -> None: ...

    async def tell(self, tokens: int) -> None: ...


class Clients:
    """Of one run. `run` asks every request at its time and returns when all have ended."""

    def __init__(
        self,
        conductor: Conductor,
        prompts: Prompts,
        on_record: Callable[[Record], None],
        front: Front | None = None,
    ) -> None:
        self._began = 0.0
        self._conductor = conductor
        self._prompts = prompts
        self._on_record = on_record
        self._front = front  # None: it takes no time

    async def run(self, requests: Iterator[Request]) -> None:
        loop = asyncio.get_running_loop()
        self._began = began = loop.time()
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                await asyncio.sleep(max(0.0, began + request.at_s - loop.time()))
                group.create_task(self._client(index, request))

    async def _client(self, index: int, request: Request) -> None:
        self._on_record(await self._ask(index, request))

    async def _ask(self, index: int, request: Request) -> Record:
        loop, prompts = asyncio.get_running_loop(), self._prompts
        came: list[tuple[float, int]] = []  # when a unit came, and what its device says
        cached, code, asked_at, name = 0, OK, loop.time(), f"r{index}"
        options = Options(
            temperature=0.0,
            seed=0,
            max_tokens=prompts.answer_units(request.output_tokens),
            ignore_eos=True,
        )
        timeline: Timeline | None = None  # kept: a conductor forgets old ones
        prompt = prompts.prompt(request.input_tokens, request.blocks)
        try:
            model, priority = self._conductor.model.name, request.priority
            if self._front is not None:
                await self._front.ask(request.input_tokens)
            ask = Ask(model, (prompt,), options, request_id=name, priority=priority)
            prepared = await self._conductor.prepare(ask, "sim")
            async with aclosing(self._conductor.generate(prepared)) as answer:
                async for part in answer:
                    timeline = timeline or self._conductor.traces.get(name)
                    if isinstance(part, Usage):
                        cached = part.cached_tokens
                        continue
                    if self._front is not None:
                        await self._front.tell(sum(len(delta.tokens) for delta in part))
                    now = loop.time()
                    came += [(now, token.token_id) for delta in part for token in delta.tokens]
        except BatonError as error:
            code = error.code
        timeline = timeline or self._conductor.traces.get(name)
        prefill, decode, predicted_s = _placed(timeline)
        return Record(
            index=index,
            at_s=asked_at - self._began,
            code=code,
            ttft_s=came[0][0] - asked_at if came else None,
            end_s=loop.time() - self._began,
            prompt_tokens=request.input_tokens,
            output_tokens=min(request.output_tokens, 1 + max(len(came) - 1, 0) * prompts.grain),
            cached_tokens=cached * prompts.grain,
            prefill=prefill,
            decode=decode,
            predicted_ttft_s=predicted_s,
            **_waits(timeline, prefill or decode),
            **_gaps(came, prompts.grain),
        )


def _placed(timeline: Timeline | None) -> tuple[str, str, float | None]:
    """Where the last attempt went, and the predicted TTFT."""
    attempts = list(timeline.attempts.values()) if timeline is not None else []
    decision = attempts[-1].decision if attempts else None
    if decision is None:
        return "", "", None
    prefill = decision.prefill.info.name if decision.prefill is not None else ""
    return prefill, decision.decode.info.name, decision.ttft_s


def _waits(timeline: Timeline | None, worker: str) -> dict[str, float | None]:
    """What the prompt of the last attempt waited for at the worker that computed it."""
    told: dict[str, float] = {}
    if timeline is not None and timeline.attempts:
        last = str(next(reversed(timeline.attempts)))
        for source, attempt, span in timeline.spans:
            if source == worker and attempt == last:
                told[span.name] = span.end_s - span.start_s
    if "queue" in told:
        told.setdefault("fetch", 0.0)
    return {f"{name}_s": told.get(name) for name in ("queue", "fetch", "prefill")}


def _gaps(came: list[tuple[float, int]], grain: int) -> dict[str, float | None]:
    """Seconds between tokens. A unit's gap is that of `grain` tokens, of which its device knows the
    worst; of the first gap, what is not the device's is the handover."""
    if len(came) < 2:
        return dict.fromkeys(_GAPS)
    gaps = sorted((b[0] - a[0]) / grain for a, b in pairwise(came))
    worst = max(tick for _, tick in came[1:]) * TICK_S
    first = came[1][0] - came[0][0] - (grain - 1) * came[1][1] * TICK_S
    return {
        "tbt_mean_s": sum(gaps) / len(gaps),
        "tbt_p50_s": percentile(gaps, 50),
        "tbt_p90_s": percentile(gaps, 90),
        "tbt_p99_s": percentile(gaps, 99),
        "tbt_worst_s": _longest_tenth(came, grain),
        "tbt_max_s": max(worst, first),
    }


def _longest_tenth(came: list[tuple[float, int]], grain: int) -> float:
    """Their mean, as FAST'25 counts the TBT of a request. It hangs on how a unit's seconds are
    spread over its tokens: as many gaps as it takes are as long as the worst, the others are alike.
    """
    least = min(tick for _, tick in came[1:]) * TICK_S
    runs: list[tuple[float, int]] = []  # a gap, and how many are as long
    for before, (at, tick) in pairwise(came):
        total, worst = at - before[0], tick * TICK_S
        if total >= grain * worst:  # it waited, too: once
            runs += [(total - (grain - 1) * worst, 1), (worst, grain - 1)]
            continue
        carrying = round((total - grain * least) / (worst - least)) if worst > least else grain
        carrying = min(max(carrying, 1), grain)
        rest = grain - carrying
        runs.append((worst, carrying))
        if rest:
            runs.append(((total - carrying * worst) / rest, rest))
    runs.sort(reverse=True)
    count = left = max(1, (len(came) - 1) * grain // 10)
    seconds = 0.0
    for gap, times in runs:
        taken = min(times, left)
        seconds += taken * gap
        left -= taken
    return seconds / count
