"""When a client whose stream has ended badly connects again, and how long it waits first."""

from __future__ import annotations

from baton.errors import BatonError, NoWorker, Overloaded, PeerGone, TakenOver

RECONNECTS = 10  # in a row without a new event, until a stream that has begun is given up
FIRST_PAUSE_S = 0.2
LAST_PAUSE_S = 3.0


def may_go_on(error: BatonError, silent: bool, begun: bool, failures: int, addresses: int) -> bool:
    """Whether another connection may bring what this one did not. `silent`: nothing was heard for
    too long; `begun`: some event has come; `failures` in a row, this one included."""
    broken = silent or isinstance(error, PeerGone)
    if begun:  # also when somebody else came with our token: who comes last has the answer
        retryable = broken or error.retryable or isinstance(error, TakenOver)
        return retryable and failures <= RECONNECTS
    # Before the first event, only somebody else may help.
    return (broken or isinstance(error, NoWorker)) and failures < addresses


def pause_before(error: BatonError, failures: int, addresses: int, share: float) -> float:
    """Seconds until the next connection: longer and longer ones, each time that all addresses have
    been tried. Of these only a `share`, which is drawn, so that many do not come together; what a
    conductor has said is waited for, which has drawn it itself."""
    rounds = failures // addresses
    pause_s = min(FIRST_PAUSE_S * 2**rounds, LAST_PAUSE_S) if rounds else 0.0
    pause_s *= share
    return max(pause_s, error.retry_after_s) if isinstance(error, Overloaded) else pause_s
