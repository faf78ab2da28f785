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


class EngineListener(Protocol):
    def on_kv_ready(self, ready: tuple[KvReady, ...]) -> None:
        """Only for sequences submitted with hand_off. Blocks are LEASED until `Engine.release`."""

    def on_prefilled(
        self, attempt: AttemptId, first: SampledToken, num_blocks: int, cached_tokens: int
    ) -> None:
        """Only with hand_off: every block has been reported by on_kv_ready; the sequence has left
        the scheduler and holds its blocks LEASED until `Engine.release(attempt)`."""

    def on_outputs(self, outputs: tuple[AttemptOutput, ...]) -> None:
        """One call per step with everything that step produced, first tokens of handed-off
        sequences included (without a finish: the worker adds HANDED_OFF when it is released)."""
