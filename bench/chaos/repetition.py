"""One repetition: load, a marked request in a phase, a signal, and what became of everything."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from baton.types.fleet import BlockState
from bench.chaos.clients import Asking
from bench.chaos.cluster import Cluster
from bench.chaos.phases import Phase, PhaseMissed, Placed, find, held_in
from bench.chaos.processes import Kept
from bench.chaos.questions import Question, Questions
from bench.chaos.references import Answers
from bench.chaos.waiting import until

DEAD_S = 60.0  # until a stopped process is given up
LIVE_S = 120.0  # until it is back
IDLE_S = 40.0
REDIS_STOP_S = 4.0
_MISSES = 5
_IDLE = (BlockState.FREE, BlockState.CACHED)


class Kind(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    STORE = "kvstore"
    CONDUCTOR = "conductor"
    REDIS = "redis"


class Fault(StrEnum):
    NONE = "none"  # to compare with: everything else is the same
    KILL = "SIGKILL"
    STOP = "SIGSTOP"


@dataclass(frozen=True, slots=True)
class Cell:
    """What is hit, when, and how. `kind` means nothing without a fault."""

    kind: Kind
    phase: Phase
    fault: Fault


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one repetition; seconds. `recovery_s` is from the signal (SIGSTOP: from SIGCONT) until
    everybody sees the process live; `noticed_s` from SIGSTOP until the others had given it up."""

    cell: Cell
    victim: str
    requests: int
    lost: tuple[str, ...]
    wrong: tuple[str, ...]
    leaked: tuple[str, ...]
    marked_s: float
    attempts: tuple[str, ...]  # at the marked request: who, and how each ended
    missed: int  # times that the request went through the phase unseen
    noticed_s: float | None = None
    recovery_s: float | None = None

    @property
    def good(self) -> bool:
        came_back = self.cell.fault is Fault.NONE or self.recovery_s is not None
        return came_back and not (self.lost or self.wrong or self.leaked)


class Repetitions:
    """Makes them, one after the other, on one cluster."""

    def __init__(self, cluster: Cluster, questions: Questions, answers: Answers) -> None:
        self._cluster = cluster
        self._questions = questions
        self._answers = answers
        self._numbers = itertools.count()
        self._missed = 0

    async def run(self, cell: Cell) -> Outcome:
        """Raises PhaseMissed when the phase cannot be caught."""
        self._missed = 0
        while True:
            try:
                return await self._once(cell, next(self._numbers))
            except PhaseMissed:
                self._missed += 1
                if self._missed == _MISSES:
                    raise

    async def _once(self, cell: Cell, number: int) -> Outcome:
        cluster = self._cluster
        conductors = cluster.shape.conductor_names
        conductors = conductors[number % len(conductors) :] + conductors[: number % len(conductors)]
        request_id = f"chaos-{number}"
        salted = {"cache_salt": request_id, "request_id": request_id, "priority": 5}
        question = self._questions.marked[number // 2 % len(self._questions.marked)]
        marked = Asking(question.with_options(**salted), [cluster.url(c) for c in conductors])
        others = self._load(number, conductors, cell.phase is Phase.QUEUED)
        noticed_s = recovery_s = None
        async with asyncio.TaskGroup() as group:
            for other in others:
                group.create_task(other.run())
            group.create_task(marked.run())
            try:
                placed = await find(cluster, conductors[0], request_id)
                victim = _victim(cell.kind, placed)
                async with held_in(cell.phase, cluster, placed, marked, victim):
                    hit_at, life = _now(), cluster.kept[victim].pid
                    if cell.fault is Fault.KILL:
                        cluster.kept[victim].send(signal.SIGKILL)
                    elif cell.fault is Fault.STOP:
                        cluster.kept[victim].send(signal.SIGSTOP)
            except PhaseMissed as error:
                missed: PhaseMissed | None = error
            else:
                missed = None
                noticed_s, recovery_s = await self._recover(cell, victim, life, hit_at, marked)
        leaked = await self._leaks()
        if missed is not None:
            raise missed
        attempts = await self._attempts(conductors, request_id)
        return Outcome(
            cell,
            victim,
            requests=len(others) + 1,
            lost=self._names("lost", (marked, *others)),
            wrong=self._names("wrong", (marked, *others)),
            leaked=leaked,
            marked_s=marked.seconds,
            attempts=attempts,
            missed=self._missed,
            noticed_s=noticed_s,
            recovery_s=recovery_s,
        )

    def _load(self, number: int, conductors: Sequence[str], queue: bool) -> list[Asking]:
        """Half of it at each conductor; the long ones, behind which a request queues, last."""
        questions = self._questions
        salt = f"chaos-{number}"
        # Eight in turns, so that their prefixes are known from before.
        count = len(questions.others)
        asked: list[Question] = [questions.others[(number * 8 + n) % count] for n in range(8)]
        if queue:
            asked += [each.with_options(cache_salt=salt) for each in questions.ahead]
        askings = []
        for n, each in enumerate(asked):
            turn = n % len(conductors)
            urls = [self._cluster.url(c) for c in (*conductors[turn:], *conductors[:turn])]
            askings.append(Asking(each, urls, breaks=n % 4 == 3))
        return askings

    async def _recover(
        self, cell: Cell, victim: str, life: int, hit_at: float, marked: Asking
    ) -> tuple[float | None, float | None]:
        """Return `noticed_s` and `recovery_s`. `life` is the process id that was hit."""
        cluster, kept = self._cluster, self._cluster.kept[victim]
        if cell.fault is Fault.NONE:
            return None, None
        noticed_s = None
        if cell.fault is Fault.STOP:
            if victim == "redis":
                await asyncio.sleep(REDIS_STOP_S)
            elif await until(lambda: cluster.is_dead(victim), DEAD_S):
                noticed_s = _now() - hit_at
            if cell.kind is Kind.CONDUCTOR:  # it wakes up when another one has given the answer
                await until(marked.has_ended, DEAD_S)
            kept.send(signal.SIGCONT)
            hit_at = _now()
        else:
            await until(lambda: _lives_again(kept, life), LIVE_S)
        came_back = await until(lambda: cluster.is_live(victim), LIVE_S)
        return noticed_s, _now() - hit_at if came_back else None

    async def _leaks(self) -> tuple[str, ...]:
        """Workers that hold blocks, or sequences, when nobody asks anything any more."""
        found: list[str] = []

        async def none() -> bool:
            found[:] = await self._held()
            return not found

        await until(none, IDLE_S)
        return tuple(found)

    async def _held(self) -> list[str]:
        held = []
        for conductor in self._cluster.shape.conductor_names:
            members = await self._cluster.members(conductor)
            for name, member in members.items():
                if member["state"] != "live":
                    continue
                blocks = {s: n for s, n in member["blocks"].items() if n and s not in _IDLE}
                load = {s: n for s in ("running", "waiting") if (n := member[s])}
                total = sum(member["blocks"].values())
                if member["role"] != "store" and total != member["num_blocks"]:
                    blocks["accounted for"] = total
                if blocks or load:
                    held.append(f"{name} at {conductor}: {blocks | load}")
        return held

    async def _attempts(self, conductors: Sequence[str], request_id: str) -> tuple[str, ...]:
        """Those that conductors which live now made at the marked request."""
        traces = [(each, await self._cluster.trace(each, request_id)) for each in conductors]
        return tuple(
            f"{name}: {attempt['prefill']} > {attempt['decode']}: {attempt['ended']}"
            for name, trace in traces
            for attempt in trace.get("attempts", ())
        )

    def _names(self, verdict: str, askings: Sequence[Asking]) -> tuple[str, ...]:
        return tuple(
            f"{each.question.name}: {each.error or _difference(each, self._answers)}"
            for each in askings
            if each.verdict(self._answers[each.question.name]) == verdict
        )


def _difference(asking: Asking, answers: Answers) -> str:
    right = answers[asking.question.name]
    pairs = zip(asking.tokens, right, strict=False)
    first = next(
        (n for n, (a, b) in enumerate(pairs) if a != b), min(len(asking.tokens), len(right))
    )
    return f"{len(asking.tokens)} tokens of {len(right)}, the first difference at {first}"


async def _lives_again(kept: Kept, life: int) -> bool:
    return kept.runs and kept.pid != life


def _victim(kind: Kind, placed: Placed) -> str:
    return {
        Kind.PREFILL: placed.prefill,
        Kind.DECODE: placed.decode,
        Kind.STORE: "store-0",
        Kind.CONDUCTOR: placed.conductor,
        Kind.REDIS: "redis",
    }[kind]


def _now() -> float:
    return asyncio.get_running_loop().time()
