"""What the engine tells its process about. Called on the event loop, never blocking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from baton.types.request import AttemptId, AttemptOutput, SampledToken


@dataclass(frozen=True, slots=True)
class KvReady:
    """Final KV of an attempt that will be handed off: layers [layer_begin, layer_end) of
    `blocks`, which are the sequence's logical blocks from `first_block` on."""

    attempt: AttemptId
    first_block: int
    blocks: tuple[int, ...]
    layer_begin: int
    layer_end: int


@dataclass(frozen=True, slots=True)
class KvWanted:
    """KV that a sequence could get from elsewhere: of its logical blocks from `first_block` on,
    which are `blocks` in the pool and have the chained `keys` (16 bytes each)."""

    sequence: int  # engine-wide number; for `Engine.arrived`
    attempt: AttemptId
    first_block: int
    blocks: tuple[int, ...]
    keys: bytes


@dataclass(frozen=True, slots=True)
class KvFilled:
    """Blocks that became full and can be found: logical blocks of one sequence from `first_block`
    on, by their chained `keys`. They may have gone again when somebody looks. `parent` is the key
    before the first of them, empty when that is the sequence's first block."""

    first_block: int
    keys: bytes
    parent: bytes = b""


class EngineListener(Protocol):
    def on_kv_ready(self, ready: tuple[KvReady, ...]) -> None:
        """Only for sequences submitted with hand_off. Blocks are LEASED until `Engine.release`."""

    def on_prefilled(
        self, attempt: AttemptId, first: SampledToken, num_blocks: int, cached_tokens: int
    ) -> None:
        """Only with hand_off: every block has been reported by on_kv_ready; the sequence has left
        the scheduler and holds its blocks LEASED until `Engine.release(attempt)`."""

    def on_kv_wanted(self, wanted: tuple[KvWanted, ...]) -> None:
        """Only for sequences submitted with `fetchable` blocks that the pool lacks. The listener
        fetches, and calls `Engine.arrived` exactly once for each, whatever happens: until then the
        sequence waits, and a transfer may write to the blocks."""

    def on_kv_filled(self, filled: tuple[KvFilled, ...]) -> None:
        """Blocks that somebody else might want to keep too."""

    def on_outputs(self, outputs: tuple[AttemptOutput, ...]) -> None:
        """One call per step with everything that step produced, first tokens of handed-off
        sequences included (without a finish: the worker adds HANDED_OFF when it is released)."""

    def on_blocks_changed(self) -> None:
        """Blocks came free, or went into quarantine, at a moment without outputs: by the end of a
        reservation, of a loan, or of a step or transfer that used them after their sequence's
        finish was told."""
