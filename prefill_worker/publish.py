"""Between the engine and the publisher: whose word ends an attempt, and with what.

    engine ends it (stop, length, error, cancel)    -> Finish reported, publisher told to refuse
    publisher ends it: RELEASED                     -> Finish(HANDED_OFF)
    publisher ends it: EXPIRED, ABORTED, REFUSED    -> work stopped, Finish(ERROR, retryable)

Each attempt is reported as finished exactly once, by whichever comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from baton.engine.loop import Engine
from baton.errors import BatonError, LeaseExpired, PeerGone, TransportError
from baton.kv.handoff.leases import Ending
from baton.kv.handoff.publisher import HandoffPublisher
from baton.rpc.errors import to_wire
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    WireError,
)

Report = Callable[[tuple[AttemptOutput, ...]], None]

FINISHED = WireError("finished", "the first token ended the answer")


class Endings:
    """Decides the one Finish of every handed-off attempt. Lives on the event loop."""

    def __init__(self, engine: Engine, report: Report) -> None:
        self._engine = engine
        self._report = report
        self._live: set[AttemptId] = set()
        self._releasing: set[AttemptId] = set()  # inside the publisher's release
        self._finishes: dict[AttemptId, Finish] = {}  # what the engine said about those
        self._errors: dict[AttemptId, WireError] = {}  # why the publisher stopped those

    def begin(self, attempt: AttemptId) -> None:
        self._live.add(attempt)

    def forget(self, attempt: AttemptId) -> None:
        """The attempt was not accepted by the engine, and its caller reports that."""
        self._live.discard(attempt)

    def release(self, attempt: AttemptId) -> None:
        """The publisher needs the attempt's blocks no more; `on_end` follows at once, or has come
        before, while the engine was in the step that made the blocks."""
        error = self._errors.pop(attempt, None)
        if error is None:
            self._releasing.add(attempt)
        finish = self._engine.release(attempt)
        if finish is None:
            return
        if error is None:
            self._finishes[attempt] = finish
        else:
            self._finish(attempt, _failed(finish, error))

    def on_end(self, attempt: AttemptId, how: Ending) -> None:
        """The publisher is done with the attempt."""
        self._releasing.discard(attempt)
        finish = self._finishes.pop(attempt, None)
        if attempt not in self._live:
            return  # the engine had ended it, and its Finish has been reported
        if how is Ending.RELEASED and finish is not None:
            self._finish(attempt, finish)
            return
        error = to_wire(_reason(attempt, how))
        if finish is not None:
            self._finish(attempt, _failed(finish, error))
        else:
            self._errors[attempt] = error
            self._engine.cancel(attempt)

    def on_outputs(self, outputs: tuple[AttemptOutput, ...], publisher: HandoffPublisher) -> None:
        """What one step produced: report it, and let the publisher drop what has ended."""
        told = [self._settled(output) for output in outputs]
        self._report(tuple(output for output in told if output.tokens or output.finish))
        for output in told:
            if output.finish is not None:
                publisher.finish_without_handoff(output.attempt, refusal(output.finish))

    def _settled(self, output: AttemptOutput) -> AttemptOutput:
        """`output` with the Finish that is due now: the engine's, the publisher's, or none yet."""
        attempt, finish = output.attempt, output.finish
        if finish is None:
            return output
        if attempt in self._releasing:
            self._finishes[attempt] = finish
            return AttemptOutput(attempt, output.tokens)
        self._live.discard(attempt)
        if (error := self._errors.pop(attempt, None)) is not None:
            finish = _failed(finish, error)
        return AttemptOutput(attempt, output.tokens, finish)

    def _finish(self, attempt: AttemptId, finish: Finish) -> None:
        self._live.discard(attempt)
        self._report((AttemptOutput(attempt, finish=finish),))


def refusal(finish: Finish) -> WireError:
    """Why the decode worker will get no KV from an attempt that has ended here."""
    if finish.error is not None:
        return finish.error
    if finish.reason is FinishReason.CANCELLED:
        return WireError("cancelled", "the attempt was cancelled")
    return FINISHED


def _failed(finish: Finish, error: WireError) -> Finish:
    return replace(finish, reason=FinishReason.ERROR, error=error)


def _reason(attempt: AttemptId, how: Ending) -> BatonError:
    if how is Ending.EXPIRED:
        return LeaseExpired(f"no decode worker took over the KV of {attempt} in time")
    if how is Ending.ABORTED:
        return PeerGone(f"the decode worker gave up taking over the KV of {attempt}")
    return TransportError(f"the handoff of {attempt} was refused")
