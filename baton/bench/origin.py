"""Where a benchmark's figures come from: what is needed to repeat it, and to compare them."""

from __future__ import annotations

import os
import platform
import shlex
from datetime import UTC, datetime
from typing import Any

from baton import __version__


def origin(benchmark: str, *command: str) -> dict[str, Any]:
    """The head of its JSON. `command` is what was called, word by word."""
    return {
        "benchmark": benchmark,
        "command": shlex.join(command),
        "baton": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "os": platform.system(),
            "arch": platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
            "load_1min": os.getloadavg()[0],
        },
    }
