"""What several conductors share: who they are, and where each running request decodes."""

from __future__ import annotations

from dataclasses import dataclass

from baton.types.fleet import Peer
from baton.types.request import AttemptId


@dataclass(frozen=True, slots=True)
class ConductorInfo:
    """A conductor's announcement. `incarnation` is new at every start of the process."""

    name: str
    incarnation: str
    http: str  # host:port that clients use
    grpc: str  # host:port that workers register at


@dataclass(frozen=True, slots=True)
class AnswerPlace:
    """One answer of a request: which attempt is at it, and who decodes that."""

    attempt: AttemptId
    decode: Peer


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A running request. Written when an attempt is placed, never per token."""

    conductor: str  # incarnation of the one that serves it
    answers: tuple[AnswerPlace, ...]
