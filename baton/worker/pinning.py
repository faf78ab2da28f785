"""Prompts whose KV is to stay in the node's store for a while (`cache_pin_s`).

    begin(task) -> computed -> first token -> offer of the whole prompt, with `pin_s`

The engine offers what it has computed by itself. Blocks that were found in the pool, or fetched,
must be pinned as well: so the prompt is offered once more, all of it. The store reads what it lacks
and pins the rest where it is.
"""

from __future__ import annotations

from collections.abc import Callable

from baton.hashing import block_keys, root_key
from baton.types.fleet import KvLayout
from baton.types.request import AttemptId, AttemptOutput, GenerationTask


class PromptPins:
    """Belongs to the event loop. `offer` is `Offers.offer`."""

    def __init__(
        self, layout: KvLayout, offer: Callable[[bytes, int, bytes, float | None], None]
    ) -> None:
        self._layout = layout
        self._offer = offer
        self._tasks: dict[AttemptId, GenerationTask] = {}

    def begin(self, task: GenerationTask) -> None:
        if task.cache_pin_s is not None:
            self._tasks[task.attempt] = task

    def forget(self, attempt: AttemptId) -> None:
        self._tasks.pop(attempt, None)

    def on_outputs(self, outputs: tuple[AttemptOutput, ...]) -> None:
        """The first output of an attempt says that its prompt is computed, or never will be."""
        if not self._tasks:
            return
        for output in outputs:
            task = self._tasks.pop(output.attempt, None)
            if task is not None and output.tokens:
                self._pin(task)

    def _pin(self, task: GenerationTask) -> None:
        layout = self._layout
        root = root_key(
            layout.model, layout.dtype, layout.block_size, layout.quantization, task.cache_salt
        )
        keys = b"".join(block_keys(root, task.prompt, layout.block_size))
        if keys:
            self._offer(keys, 0, b"", task.cache_pin_s)
