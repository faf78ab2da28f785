"""When a process has to end: signals, and the disappearance of whoever started it.

SIGTERM, SIGINT    once: drain; twice: at once
SIGHUP             at once (sent to itself when standard input is closed, if asked to watch it)
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from typing import NoReturn

log = logging.getLogger(__name__)

ORPHAN_GRACE_S = 1.5  # what an orphan may take for an orderly end


class StopSignals:
    """`install` it once, inside the running event loop."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_stop)
        loop.add_signal_handler(signal.SIGINT, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_hurry)

    def _on_stop(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()

    def _on_hurry(self) -> None:
        self.stop.set()
        self.hurry.set()


def watch_parent() -> None:
    """End this process soon after its standard input has ended, whatever it is doing.

    A thread and not a reader on the event loop: it must also work while a model is loaded.
    """
    thread = threading.Thread(target=_end_with_stdin, name="parent-watch", daemon=True)
    thread.start()


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)


def exit_now(code: int) -> NoReturn:
    """End the process after a clean shutdown, without the interpreter's and the loader's clean-up.

    Libraries that NIXL loads can crash in theirs when two copies of one are in the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
