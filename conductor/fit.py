"""Whether a worker or a store may join the fleet: one protocol, one model, one layout of KV."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from baton import __version__
from baton.errors import LayoutMismatch, ProtocolMismatch
from baton.types.fleet import PROTOCOL, KvLayout, Role, WorkerInfo

REMEMBER_S = 300.0
MOST = 16  # refusals that are remembered

log = logging.getLogger(__name__)


def check_fit(info: WorkerInfo, others: Iterable[WorkerInfo], fingerprint: str | None) -> None:
    """Raises ProtocolMismatch or LayoutMismatch, naming both sides. `others`: who is live;
    `fingerprint`: of the model that the conductor has the tokenizer of, if it knows one."""
    if info.protocol != PROTOCOL:
        raise ProtocolMismatch(
            f"{_who(info)} runs baton {info.version or 'of an older version'} (protocol "
            f"{info.protocol}), but this conductor runs {__version__} (protocol {PROTOCOL}): "
            "start both from the same version"
        )
    if fingerprint is not None and info.layout.model != fingerprint:
        raise LayoutMismatch(
            f"{_who(info)} serves the model {info.model_name}, whose weights and configuration "
            f"have the fingerprint {info.layout.model[:12]}, but those of this conductor's model "
            f"have {fingerprint[:12]}: start both with the same model"
        )
    for other in others:
        if other.name != info.name and other.layout != info.layout:
            here, there = _apart(info.layout, other.layout)
            raise LayoutMismatch(
                f"{_who(info)} has {here}, but {_who(other)} of this fleet has {there}: "
                "start both with the same settings"
            )


def _who(info: WorkerInfo) -> str:
    kind = "store" if info.role is Role.STORE else f"{info.role} worker"
    return f"{kind} {info.name}"


def _apart(one: KvLayout, other: KvLayout) -> tuple[str, str]:
    """What each has where they differ."""
    pairs = list(zip(one.describe().split(), other.describe().split(), strict=True))
    differing = [pair for pair in pairs if pair[0] != pair[1]] or pairs
    here, there = zip(*differing, strict=True)
    return " ".join(here), " ".join(there)


@dataclass(frozen=True, slots=True)
class Refusal:
    """`at`: of the event loop."""

    info: WorkerInfo
    reason: str
    at: float


class Refusals:
    """Who was refused of late: operators look for a worker that is missing at the conductor first.

    A worker that other conductors accept asks again and again; it is logged once.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Refusal] = {}

    def note(self, info: WorkerInfo, reason: str, now: float) -> None:
        known = self._by_name.pop(info.name, None)
        if known is None or known.reason != reason:
            log.warning("refused who came from %s: %s", info.address, reason)
        self._by_name[info.name] = Refusal(info, reason, now)
        while len(self._by_name) > MOST:
            del self._by_name[next(iter(self._by_name))]

    def forget(self, name: str) -> None:
        """It was accepted."""
        self._by_name.pop(name, None)

    def recent(self, now: float) -> tuple[Refusal, ...]:
        """The last one of each name."""
        return tuple(each for each in self._by_name.values() if now - each.at < REMEMBER_S)
