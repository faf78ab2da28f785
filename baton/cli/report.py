"""What `baton serve` says while it runs: JSON lines, plain lines, or spinners on a terminal."""

from __future__ import annotations

import os
import re
import sys
from types import TracebackType
from typing import Any, Self

import orjson
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

_IMPORTANT = re.compile(r"\b(WARNING|ERROR|CRITICAL|Traceback)\b")


class Reporter:
    """Results go to standard output, everything else to standard error.

    Use as a context manager; spinners are shown only in between.
    """

    def __init__(self, as_json: bool, verbose: bool) -> None:
        self._json = as_json
        self._verbose = verbose
        self._console = Console(stderr=True, highlight=False)
        self._spinners = self._console.is_terminal and not as_json
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=False,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._spinners:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.settle()

    def settle(self) -> None:
        """End the spinners: what follows is printed below them."""
        if self._spinners:
            self._progress.stop()
            self._spinners = False

    def event(self, event: str, text: str, /, **fields: Any) -> None:
        """Something that happened: an object on standard output, or a line on standard error."""
        if self._json:
            self._object({"event": event, **fields})
        elif not self._spinners:
            self._console.print(Text(text))

    def step(self, name: str, text: str, done: bool = False, **fields: Any) -> None:
        """Progress of the process or phase `name`."""
        self.event(
            "done" if done else "progress", f"{name}: {text}", name=name, text=text, **fields
        )
        if not self._spinners:
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=1)
        self._progress.update(
            self._tasks[name], description=f"{name:<10} {text}", completed=1 if done else 0
        )

    def result(self, event: str, text: str, **fields: Any) -> None:
        """What the user waits for, on standard output."""
        if self._json:
            self._object({"event": event, **fields})
        else:
            _write(text)

    def log(self, name: str, line: str) -> None:
        """A line that a process wrote, when it matters or everything was asked for."""
        if self._verbose or _IMPORTANT.search(line):
            self._console.print(Text(f"{name} | {line}"), soft_wrap=True)

    def _object(self, fields: dict[str, Any]) -> None:
        _write(orjson.dumps(fields).decode())


def _write(line: str) -> None:
    """To standard output. A cluster serves on when whoever read that has gone (`| head -1`)."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # also for the flush at exit
        os.close(nowhere)
