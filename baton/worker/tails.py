"""What was answered so far by the attempts that decode here, for conductors that take them over."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass

from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    GenerationTask,
    SampledToken,
    TokenLogprob,
)

LINGER_S = 15.0  # how long an answer that has ended is kept
MAX_ENDED_BYTES = 16 << 20  # of all of those; the oldest go first
ENTRY_BYTES = 512  # what one costs besides its tokens, about


class Tail:
    """The tokens of one answer from index 0: those that the task came with, and those that this
    worker has reported since. 4 bytes each, and more only where log-probabilities are asked for."""

    def __init__(self, task: GenerationTask) -> None:
        self._ids = array("I", task.output)
        self._given = len(task.output)
        self._logprobs = _Logprobs() if task.sampling.logprobs is not None else None

    @property
    def decodes(self) -> bool:
        """Whether anything has been added."""
        return len(self._ids) > self._given

    @property
    def nbytes(self) -> int:
        more = 0 if self._logprobs is None else self._logprobs.nbytes
        return self._ids.itemsize * len(self._ids) + more

    def add(self, tokens: tuple[SampledToken, ...]) -> None:
        """The next ones. An engine reports an answer's tokens in order, and none twice."""
        for token in tokens:
            self._ids.append(token.token_id)
            if self._logprobs is not None:
                self._logprobs.add(token.logprob)

    def tokens(self) -> tuple[SampledToken, ...]:
        """All of them. The task's own have no log-probabilities: their conductor had them."""
        return tuple(
            SampledToken(token_id, index, self._logprob(index))
            for index, token_id in enumerate(self._ids)
        )

    def _logprob(self, index: int) -> TokenLogprob | None:
        if self._logprobs is None or index < self._given:
            return None
        return self._logprobs.get(index - self._given)


class _Logprobs:
    """A list of `TokenLogprob | None` without an object for each number."""

    def __init__(self) -> None:
        self._known = bytearray()
        self._chosen = array("d")
        self._ends = array("L")  # of each token's part of the two below
        self._top_ids = array("I")
        self._top = array("d")

    @property
    def nbytes(self) -> int:
        arrays = (self._chosen, self._ends, self._top_ids, self._top)
        return len(self._known) + sum(each.itemsize * len(each) for each in arrays)

    def add(self, value: TokenLogprob | None) -> None:
        for token_id, logprob in () if value is None else value.top:
            self._top_ids.append(token_id)
            self._top.append(logprob)
        self._known.append(value is not None)
        self._chosen.append(0.0 if value is None else value.logprob)
        self._ends.append(len(self._top))

    def get(self, index: int) -> TokenLogprob | None:
        if not self._known[index]:
            return None
        part = slice(self._ends[index - 1] if index else 0, self._ends[index])
        top = zip(self._top_ids[part], self._top[part], strict=True)
        return TokenLogprob(self._chosen[index], tuple(top))


@dataclass(frozen=True, slots=True)
class _Ended:
    until: float
    tail: Tail
    finish: Finish

    @property
    def nbytes(self) -> int:
        return ENTRY_BYTES + self.tail.nbytes


class EndedTails:
    """Answers that have ended: the conductor that was told may be gone before its client was."""

    def __init__(self, linger_s: float = LINGER_S, max_bytes: int = MAX_ENDED_BYTES) -> None:
        self._linger_s = linger_s
        self._max_bytes = max_bytes
        self._entries: dict[AttemptId, _Ended] = {}  # the oldest first
        self._nbytes = 0

    def keep(self, attempt: AttemptId, tail: Tail, finish: Finish) -> None:
        self._drop_old()
        if attempt in self._entries:
            self._drop(attempt)
        ended = self._entries[attempt] = _Ended(_now() + self._linger_s, tail, finish)
        self._nbytes += ended.nbytes
        while self._nbytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def find(self, attempt: AttemptId) -> AttemptOutput | None:
        """Everything that there was to say about the attempt."""
        self._drop_old()
        ended = self._entries.get(attempt)
        if ended is None:
            return None
        return AttemptOutput(attempt, ended.tail.tokens(), ended.finish)

    def _drop_old(self) -> None:
        now = _now()
        while self._entries and self._entries[oldest := next(iter(self._entries))].until <= now:
            self._drop(oldest)

    def _drop(self, attempt: AttemptId) -> None:
        self._nbytes -= self._entries.pop(attempt).nbytes


def _now() -> float:
    return asyncio.get_running_loop().time()
