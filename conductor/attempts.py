"""Where a request's attempts run: they are routed, started and cancelled here.

A resumed attempt is routed by its whole context, prompt and the answer tokens that the client has:
that is what its KV must be found for, or computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.types.fleet import Peer, Role, WorkerState
from baton.types.link import Adopt, StartDecode, StartPrefill
from baton.types.registry import AnswerPlace
from baton.types.request import AttemptId, GenerationTask
from conductor.answer_run import AnswerRun
from conductor.expected import ExpectedBlocks
from conductor.fleet import Fleet
from conductor.link import Assignment, Listener
from conductor.matches import NO_MATCHES
from conductor.prompt_keys import prompt_keys
from conductor.request import Request
from conductor.router import Decision, RouteOptions, RouteRequest, group_of, route

JOIN_S = 3.0  # within which the workers of a conductor that has just started are linked
JOIN_POLL_S = 0.1


class Placer:
    """Of one conductor: chooses the workers of every attempt."""

    def __init__(self, fleet: Fleet, options: RouteOptions) -> None:
        self.fleet = fleet
        self.options = options
        self.expected = ExpectedBlocks()
        self._decisions = 0

    def decide(
        self, request: Request, run: AnswerRun, keys: bytes, avoid: frozenset[str]
    ) -> Decision:
        """Where the next attempt at an answer goes. Raises NoWorker."""
        prefix_map = self.fleet.prefix_map
        self._decisions += 1
        asked = RouteRequest(
            key=run.attempt.request_id,
            prompt=run.context,
            max_tokens=run.answer.sampling.max_tokens - run.num_tokens,
            avoid=avoid,
            number=self._decisions,
            priority=request.priority,
            keys=keys,
            matches=prefix_map.matches(keys) if keys and prefix_map.num_blocks else NO_MATCHES,
            computing=self.expected.blocks(group_of(keys), keys, request.priority),
        )
        now = asyncio.get_running_loop().time()
        return route(asked, self.fleet.view(), now, self.options)


class Attempts:
    """Of one request. `listener` hears of all of them."""

    def __init__(self, placer: Placer, request: Request, listener: Listener) -> None:
        self._placer = placer
        self._fleet = placer.fleet
        self._expected = placer.expected
        self._request = request
        self._listener = listener
        # By prompt and, when resumed, answer: how many tokens had been passed on, and the keys.
        self._keys: dict[tuple[int, int | None], tuple[int, bytes]] = {}
        self._placed: dict[AttemptId, tuple[Peer, ...]] = {}  # the last one decodes
        self._avoid: set[str] = set()
        self._peers: dict[str, Peer] = {}  # the last life of each worker that was asked

    @property
    def any_placed(self) -> bool:
        return bool(self._placed)

    async def hash_context(self, run: AnswerRun) -> bytes:
        """The keys of what the next attempt at the answer begins with, computed once: of a prompt
        whatever the number of its answers, of a resumed answer until it has grown."""
        layout = self._fleet.layout()
        if layout is None:
            return b""
        answer = run.answer
        name = (answer.prompt_index, answer.index if run.num_tokens else None)
        hashed = self._keys.get(name)
        if hashed is None or hashed[0] != run.num_tokens:
            salt, prefix_map = self._request.cache_salt, self._fleet.prefix_map
            keys = await prompt_keys(run.context, layout, salt, prefix_map)
            self._keys[name] = hashed = (run.num_tokens, keys)
        return hashed[1]

    def decide(self, run: AnswerRun, keys: bytes) -> Decision:
        """Raises NoWorker."""
        return self._placer.decide(self._request, run, keys, frozenset(self._avoid))

    def start(self, run: AnswerRun, decision: Decision, keys: bytes, now: float) -> None:
        """Hand the answer's current attempt to its workers. Raises WorkerLost; then it may have
        been handed to one of them: cancel it."""
        request, answer = self._request, run.answer
        task = GenerationTask(
            attempt=run.attempt,
            prompt=answer.prompt,
            sampling=answer.sampling,
            output=run.output,
            priority=request.priority,
            timeout_s=max(request.deadline - now, 0.0),
            cache_salt=request.cache_salt,
            cache_pin_s=request.cache_pin_s,
            slack_s=decision.chosen.slack_s,
            trace=request.tracing.of_attempt(run.attempt),
        )
        self._place(task.attempt, *peers(decision))
        worker = (decision.prefill or decision.decode).info.name
        self._expected.add(task.attempt, group_of(keys), keys, worker, request.priority)
        fetch = decision.fetch_plan
        computing = Assignment(
            Role.DECODE if decision.prefill is None else Role.PREFILL,
            self._listener,
            len(task.prompt) + len(task.output),
            decision.work_s,
            task.priority,
            task.slack_s,
            fetch,
            resumed=bool(task.output),
        )
        if decision.prefill is None:
            start = StartDecode(task, fetch=fetch)
            self._fleet.start(decision.decode.peer, task.attempt, computing, start)
            return
        peer = decision.prefill.peer
        self._fleet.start(peer, task.attempt, computing, StartPrefill(task, fetch))
        duty = Assignment(Role.DECODE, self._listener, 0)
        self._fleet.start(decision.decode.peer, task.attempt, duty, StartDecode(task, peer))

    def done(self, attempt: AttemptId) -> None:
        """A worker has ended its part: nobody waits for what it computes."""
        self._expected.done(attempt)

    def avoid(self, *workers: str) -> None:
        """Later attempts go to others, if there are any."""
        self._avoid.update(workers)

    def adopt(self, place: AnswerPlace) -> None:
        """Ask the worker for the attempt. Raises WorkerLost when there is no link to it."""
        duty = Assignment(Role.DECODE, self._listener, 0)
        self._fleet.start(place.decode, place.attempt, duty, Adopt(place.attempt))
        self._place(place.attempt, place.decode)

    def peer(self, worker: str) -> Peer:
        """The life of the worker that was asked last."""
        return self._peers[worker]

    def is_live(self, peer: Peer) -> bool:
        """Whether that life of the worker has a link."""
        found = self._fleet.view().find(peer.name)
        return found is not None and found.info.incarnation == peer.incarnation

    async def wait_for_links(self, workers: Sequence[Peer]) -> None:
        """To workers that this conductor does not know yet, when it has just started."""
        now = asyncio.get_running_loop().time
        until = now() + JOIN_S
        while any(map(self._may_join, workers)) and now() < until:  # noqa: ASYNC110 (no event)
            await asyncio.sleep(JOIN_POLL_S)

    def _may_join(self, peer: Peer) -> bool:
        """Whether that life of the worker may be about to have its first link."""
        views = [view for view in self._fleet.view().workers if view.info.name == peer.name]
        return not views or (
            views[0].state is WorkerState.JOINING and views[0].info.incarnation == peer.incarnation
        )

    def _place(self, attempt: AttemptId, *workers: Peer) -> None:
        self._placed[attempt] = workers
        self._peers.update((worker.name, worker) for worker in workers)

    def cancel(self, attempt: AttemptId, reason: str) -> frozenset[str]:
        """Tell its workers, unless that was done before. Returns their names."""
        placed = self._placed.pop(attempt, ())
        self._expected.done(attempt)
        for peer in placed:
            self._fleet.cancel(peer, attempt, reason)
        return frozenset(peer.name for peer in placed)

    def let_go(self) -> None:
        """Of every attempt, without a word to the workers."""
        for attempt in self._placed:
            self._expected.done(attempt)
        self._placed.clear()

    def cancel_all(self, reason: str) -> None:
        for attempt in list(self._placed):
            self.cancel(attempt, reason)


def peers(decision: Decision) -> tuple[Peer, ...]:
    """The workers that a decision chose; the last one decodes."""
    workers = (decision.prefill, decision.decode)
    return tuple(worker.peer for worker in workers if worker is not None)
