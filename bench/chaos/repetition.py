"""One repetition: load, a marked request in a phase, a signal, and what became of everything."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from bench.chaos.checks import Problems, find_problems
from bench.chaos.clients import Asking
from bench.chaos.cluster import Cluster
from bench.chaos.faults import Fault, Kind, Recovery, Strike
from bench.chaos.phases import Phase, PhaseMissed, find, held_in
from bench.chaos.questions import Question, Questions
from bench.chaos.references import Answers

_MISSES = 5  # in a row, until a phase is given up
_OTHERS = 8


@dataclass(frozen=True, slots=True)
class Cell:
    """What is hit, when, and how. `kind` means nothing without a fault."""

    kind: Kind
    phase: Phase
    fault: Fault


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one repetition. `problems` are also those of the `missed` tries before it, in which the
    marked request went through the phase unseen."""

    cell: Cell
    victim: str
    requests: int
    problems: Problems
    marked_s: float  # from asking until the end of the answer
    attempts: tuple[str, ...]  # at the marked request: who, and how each ended
    missed: int
    recovery: Recovery

    @property
    def good(self) -> bool:
        came_back = self.cell.fault is Fault.NONE or self.recovery.recovery_s is not None
        return came_back and self.problems.none


@dataclass(frozen=True, slots=True)
class _Struck:
    victim: str
    recovery: Recovery


class Repetitions:
    """Makes them, one after the other, on one cluster."""

    def __init__(self, cluster: Cluster, questions: Questions, answers: Answers) -> None:
        self._cluster = cluster
        self._questions = questions
        self._answers = answers
        self._numbers = itertools.count()

    async def run(self, cell: Cell) -> Outcome:
        """Raises PhaseMissed when the phase cannot be caught, and nothing went wrong meanwhile."""
        problems, requests, missed = Problems(), 0, 0
        struck = None
        while struck is None and missed < _MISSES:
            number = next(self._numbers)
            conductors = self._conductors(number)
            marked = self._marked(number, conductors)
            others = self._load(number, conductors, cell.phase is Phase.QUEUED)
            struck = await self._strike(cell, conductors[0], marked, others)
            missed += struck is None
            requests += 1 + len(others)
            problems += await find_problems(self._cluster, (marked, *others), self._answers)
        if struck is None and problems.none:
            raise PhaseMissed(f"{_MISSES} times in a row")
        struck = struck or _Struck("nobody", Recovery())
        return Outcome(
            cell=cell,
            victim=struck.victim,
            requests=requests,
            problems=problems,
            marked_s=marked.seconds,
            attempts=await self._attempts(conductors, _request_id(number)),
            missed=missed,
            recovery=struck.recovery,
        )

    async def _strike(
        self, cell: Cell, conductor: str, marked: Asking, others: Sequence[Asking]
    ) -> _Struck | None:
        """Ask everything, and hit somebody when the marked request is in its phase; return when all
        is answered and everybody is back. None: the phase was missed, and nobody was hit."""
        cluster, request_id = self._cluster, str(marked.question.options["request_id"])
        async with asyncio.TaskGroup() as group:
            for asking in (*others, marked):
                group.create_task(asking.run())
            try:
                placed = await find(cluster, conductor, request_id)
                strike = Strike(cluster, cell.kind, cell.fault, placed)
                async with held_in(cell.phase, cluster, placed, marked, strike.victim):
                    strike.hit()
            except PhaseMissed:
                return None
            return _Struck(strike.victim, await strike.recover(marked.has_ended))

    def _conductors(self, number: int) -> tuple[str, ...]:
        """In the order in which the marked request's client tries them: in turns."""
        names = self._cluster.shape.conductor_names
        turn = number % len(names)
        return (*names[turn:], *names[:turn])

    def _marked(self, number: int, conductors: Sequence[str]) -> Asking:
        """Nothing of its prompt is cached, and it comes after all others in queues."""
        question = self._questions.marked[number // 2 % len(self._questions.marked)]
        name = _request_id(number)
        question = question.with_options(cache_salt=name, request_id=name, priority=5)
        return Asking(question, [self._cluster.url(each) for each in conductors])

    def _load(self, number: int, conductors: Sequence[str], queue: bool) -> list[Asking]:
        """Asked at all conductors; the long ones, behind which a request queues, last."""
        questions = self._questions.others
        first = number * _OTHERS  # in turns, so that their prefixes are known from before
        asked: list[Question] = [questions[(first + n) % len(questions)] for n in range(_OTHERS)]
        if queue:
            salt = _request_id(number)
            asked += [each.with_options(cache_salt=salt) for each in self._questions.ahead]
        askings = []
        for n, each in enumerate(asked):
            turn = n % len(conductors)
            urls = [self._cluster.url(c) for c in (*conductors[turn:], *conductors[:turn])]
            askings.append(Asking(each, urls, breaks=n % 4 == 3))
        return askings

    async def _attempts(self, conductors: Sequence[str], request_id: str) -> tuple[str, ...]:
        """Those that conductors which live now made at a request."""
        traces = [(each, await self._cluster.trace(each, request_id)) for each in conductors]
        return tuple(
            f"{name}: {attempt['prefill']} > {attempt['decode']}: {attempt['ended']}"
            for name, trace in traces
            for attempt in trace.get("attempts", ())
        )


def _request_id(number: int) -> str:
    return f"chaos-{number}"
