"""Progress for people: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 30.0


@dataclass(frozen=True)
class Progress:
    """One optimizer step's outcome."""

    progress: float
    """0 to 1."""
    loss: float
    """Nats per token of this step's batch."""
    step: int
    tokens: int
    seconds: float


class Reporter:
    """Shows steps as they come; use as a context manager."""

    def __init__(self) -> None:
        self._console = Console()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=1.0)
        self._smooth = 0.0
        self._last_line = 0.0

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._console.is_terminal:
            self._bar.console.print(text)
        else:
            print(text, flush=True)

    def step(self, done: Progress) -> None:
        """Called after every step."""
        self._smooth = 0.95 * self._smooth + 0.05 * done.loss if self._smooth else done.loss
        text = (
            f"step {done.step:,}, {done.tokens / 1e6:.2f} M tokens, loss {self._smooth:.3f}, "
            f"{done.tokens / max(done.seconds, 1e-9):,.0f} tokens/s"
        )
        self._bar.update(self._task, completed=done.progress, description=text)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line > LINE_SECONDS:
            self._last_line = now
            self.say(f"{done.progress:6.1%} {done.seconds:6.0f} s  {text}")

    def held_out(self, loss: float, tokens: int) -> None:
        """Called after each measurement on held-out text; `loss` in nats per token."""
        self.say(f"held-out loss {loss:.3f} after {tokens / 1e6:.2f} M tokens")
