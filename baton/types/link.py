"""Messages on the link: one stream per (conductor, worker). The conductor dials the worker.

conductor -> worker: StartPrefill | StartDecode | Cancel | Drain
worker -> conductor: StepReport (the outputs of one engine step for all attempts, in one message)
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.types.fleet import Peer, WorkerLoad
from baton.types.request import AttemptId, AttemptOutput, GenerationTask


@dataclass(frozen=True, slots=True)
class StartPrefill:
    """Compute the prompt, sample the first token, publish the KV to whoever attaches."""

    task: GenerationTask


@dataclass(frozen=True, slots=True)
class StartDecode:
    """Read the prompt's KV from `prefill` and generate; without a peer, compute the prompt here."""

    task: GenerationTask
    prefill: Peer | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop working on the attempt and free everything. Harmless when it is unknown or done."""

    attempt: AttemptId
    reason: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new attempts; finish the running ones."""


ConductorMessage = StartPrefill | StartDecode | Cancel | Drain


@dataclass(frozen=True, slots=True)
class StepReport:
    outputs: tuple[AttemptOutput, ...]
    load: WorkerLoad


WorkerMessage = StepReport
