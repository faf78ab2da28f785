"""What an engine counts, for `/metrics`: its steps, its queue, and what it found computed already.

Recorded on the event loop, once per step or per prompt; read when somebody scrapes.
"""

from __future__ import annotations

from enum import StrEnum

from baton.counts import Counts
from baton.engine.batch import Batch
from baton.engine.sequence import Sequence
from baton.types.kv_events import Tier

_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512)


class StepKind(StrEnum):
    PREFILL = "prefill"  # prompts only
    DECODE = "decode"  # one token of each sequence
    MIXED = "mixed"


class Source(StrEnum):
    """Where KV of a prompt was, so that it need not be computed."""

    POOL = "pool"  # of the worker that needed it
    GPU = "gpu"  # the pool of another worker
    CPU = "cpu"  # a store's memory
    NVME = "nvme"  # a store's disk

    @staticmethod
    def of(tier: Tier) -> Source:
        """Somebody else's tier."""
        return Source(tier.value)


class EngineFigures:
    """Of one engine after the other in the same process."""

    def __init__(self, metrics: Counts) -> None:
        self.queue = metrics.distribution(
            "baton_engine_queue_seconds",
            "Time that a prompt waited for its turn in an engine.",
            _WAITS,
        )
        self.prefill = metrics.distribution(
            "baton_engine_prefill_seconds",
            "Time from the turn of a prompt to its first token, KV that was fetched included.",
            _WAITS,
        )
        self.steps = metrics.distributions(
            "baton_engine_step_seconds", "Time of a step.", _STEPS, "kind", StepKind
        )
        self.batch = metrics.distribution(
            "baton_engine_batch_sequences", "Sequences of a step.", _SIZES
        )
        self.tokens = metrics.tallies(
            "baton_engine_tokens",
            "Tokens that were computed: of prompts (prefill), or one of a sequence (decode).",
            "kind",
            (StepKind.PREFILL, StepKind.DECODE),
        )
        self.failed_steps = metrics.tally("baton_engine_failed_steps", "Steps that failed.")
        self.preemptions = metrics.tally(
            "baton_engine_preemptions", "Sequences that made way because the KV pool was full."
        )
        self.hits = metrics.tallies(
            "baton_prefix_hit_tokens",
            "Prompt tokens whose KV was there, by where: the worker's own pool, another worker's "
            "(gpu), a store's memory (cpu) or disk (nvme).",
            "source",
            Source,
        )

    def note_step(self, batch: Batch, seconds: float) -> None:
        prompts = [item.length for item in batch.items if item.length > 1]
        decodes = len(batch.items) - len(prompts)
        kind = StepKind.MIXED if prompts and decodes else StepKind.PREFILL
        self.steps[StepKind.DECODE if not prompts else kind].observe(seconds)
        self.batch.observe(len(batch.items))
        self.tokens.add(StepKind.PREFILL, sum(prompts))
        self.tokens.add(StepKind.DECODE, decodes)

    def note_prompt(self, sequence: Sequence) -> None:
        """It has its first token."""
        if sequence.started_at is None or sequence.first_token_at is None:
            return
        self.queue.observe(sequence.started_at - sequence.submitted_at)
        self.prefill.observe(sequence.first_token_at - sequence.started_at)
        self.hits.add(Source.POOL, sequence.found_tokens)
