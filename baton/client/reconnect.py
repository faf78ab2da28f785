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


def pause_before(error: BatonError, failures: int, addresses: int) -> float:
    """Seconds until the next connection, to be jittered: longer and longer ones, each time that
    all addresses have been tried."""
    rounds = failures // addresses
    pause_s = min(FIRST_PAUSE_S * 2**rounds, LAST_PAUSE_S) if rounds else 0.0
    return max(pause_s, error.retry_after_s) if isinstance(error, Overloaded) else pause_s
