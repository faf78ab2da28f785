"""Messages on the link: one stream per (conductor, worker). The conductor dials the worker.

conductor -> worker: StartPrefill | StartDecode | Adopt | Cancel | Drain | Resync |
                     SetRole
worker -> conductor: StepReport (the outputs of one engine step for all attempts, in one message)
                     KvEvents | KvSnapshot (which KV blocks it holds)

A store is linked in the same way. It is started and cancelled nothing, and reports no outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.types.fleet import Peer, Role, WorkerLoad
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.types.request import AttemptId, AttemptOutput, GenerationTask


@dataclass(frozen=True, slots=True)
class FetchPart:
    """Blocks [first_block, first_block + num_blocks) of the prompt may be borrowed from `source`.

    Advice: the source may have lost them since, and the worker may know that it computes faster.
    """

    source: Peer
    first_block: int
    num_blocks: int
    tier: Tier  # where the source had them when the plan was made


@dataclass(frozen=True, slots=True)
class StartPrefill:
    """Compute the prompt, sample the first token, publish the KV to whoever attaches."""

    task: GenerationTask
    fetch: tuple[FetchPart, ...] = ()


@dataclass(frozen=True, slots=True)
class StartDecode:
    """Read the prompt's KV from `prefill` and generate; without a peer, compute the prompt here."""

    task: GenerationTask
    prefill: Peer | None = None
    fetch: tuple[FetchPart, ...] = ()


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take the attempt over from a conductor that is gone or cut off.

    The worker answers with every token of the answer so far, from index 0, and goes on from there;
    or with a Finish of code `unknown_attempt`. Whoever had the attempt gets `taken_over`.
    """

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop working on the attempt and free everything. Harmless when it is unknown or done."""

    attempt: AttemptId
    reason: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new attempts; finish the running ones."""


@dataclass(frozen=True, slots=True)
class Resync:
    """This conductor has lost track of the worker's KV blocks: send a snapshot."""


@dataclass(frozen=True, slots=True)
class SetRole:
    """Drain, leave, and register again for `role`, with the weights that are loaded.

    Only for workers whose registration says that they can.
    """

    role: Role


ConductorMessage = StartPrefill | StartDecode | Adopt | Cancel | Drain | Resync | SetRole


@dataclass(frozen=True, slots=True)
class StepReport:
    outputs: tuple[AttemptOutput, ...]
    load: WorkerLoad


WorkerMessage = StepReport | KvEvents | KvSnapshot
