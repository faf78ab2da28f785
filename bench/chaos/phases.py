"""Bringing a marked request into a phase, seen from outside, so that a signal hits it there.

queued        prompts ahead of it: its prefill worker has more to compute than the prompt alone
prefilling    the worker has begun its prompt, and has not ended it
transferring  the decode worker was held still while the prompt was computed: it cannot have
              taken over when the first token comes from the prefill worker
decoding      a quarter of the answer has come
"""

from __future__ import annotations

import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

from baton.errors import BatonError
from baton.types.fleet import WorkerLoad
from bench.chaos.clients import Asking
from bench.chaos.cluster import Cluster
from bench.chaos.questions import MARKED_ANSWER, MARKED_PROMPT
from bench.chaos.waiting import until

REACH_S = 30.0
HOLD_S = 1.5  # how long a worker may be held still: less than its lease
_POLL_S = 0.004
_OTHERS_TOKENS = 500  # of prompts of the load that may be waiting at one worker


class Phase(StrEnum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"


class PhaseMissed(Exception):
    """The request went through the phase before anybody could act: try again."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Who works on the marked request."""

    conductor: str
    prefill: str
    decode: str


async def find(cluster: Cluster, conductor: str, request_id: str) -> Placed:
    """Where its first attempt went. Raises PhaseMissed."""
    found: list[Placed] = []

    async def is_placed() -> bool:
        attempts = (await cluster.trace(conductor, request_id)).get("attempts", ())
        if attempts and attempts[0]["prefill"]:
            found.append(Placed(conductor, attempts[0]["prefill"], attempts[0]["decode"]))
        return bool(found)

    await _until(is_placed, REACH_S)
    return found[0]


@asynccontextmanager
async def held_in(
    phase: Phase, cluster: Cluster, placed: Placed, marked: Asking, victim: str
) -> AsyncGenerator[None, None]:
    """The request is in the phase when the body begins. Raises PhaseMissed. Afterwards everybody
    runs on, except `victim`, with whom the body does what it likes."""
    held = phase is Phase.TRANSFERRING and placed.decode
    reached = False
    try:
        if phase is Phase.DECODING:
            await _until(lambda: _has(marked, MARKED_ANSWER // 4), REACH_S)
            _require(not marked.ended, "its answer had ended")
        else:
            begun = _is_queued if phase is Phase.QUEUED else _is_computing
            await _until_load(cluster, placed.prefill, marked, begun)
        if held:
            cluster.kept[held].send(signal.SIGSTOP)
            await _until(lambda: _has(marked, 1), HOLD_S)
        reached = True
        yield
    finally:
        if held and not (reached and held == victim):
            cluster.kept[held].send(signal.SIGCONT)


def _is_queued(load: WorkerLoad) -> bool:
    """It comes after all others there, so it has not begun."""
    return load.waiting_tokens > MARKED_PROMPT


def _is_computing(load: WorkerLoad) -> bool:
    """Its prompt is the only long one there."""
    return _OTHERS_TOKENS < load.waiting_tokens < MARKED_PROMPT


async def _has(marked: Asking, tokens: int) -> bool:
    return len(marked.tokens) >= tokens or bool(marked.ended)


async def _until_load(
    cluster: Cluster, worker: str, marked: Asking, condition: Callable[[WorkerLoad], bool]
) -> None:
    """Wait for a load of its prefill worker, before the first token comes."""

    async def holds() -> bool:
        if marked.tokens or marked.ended:
            raise PhaseMissed("its prompt was computed already")
        try:
            return condition(await cluster.load(worker))
        except (BatonError, TimeoutError):
            return False

    await _until(holds, REACH_S)
    _require(not marked.tokens, "its prompt was computed already")


async def _until(condition: Callable[[], Awaitable[bool]], within_s: float) -> None:
    if not await until(condition, within_s, _POLL_S):
        raise PhaseMissed(f"not reached within {within_s:g} s")


def _require(holds: bool, why_not: str) -> None:
    if not holds:
        raise PhaseMissed(why_not)
