"""GPUs: which ones this process may use, found without a driver's library, and who gets which."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else the numbers that CUDA gives all of this machine."""
    named = environ.get(VISIBLE)
    if named is None:
        # A container may have only /dev/nvidia3; CUDA counts what is there from 0 on.
        found = [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
        return [str(number) for number in range(len(found))]
    entries = (entry.strip() for entry in named.split(","))
    # As CUDA reads it: what is no device hides all that come after it.
    return list(itertools.takewhile(lambda entry: entry and not entry.startswith("-"), entries))


def share_gpus(gpus: Sequence[str], count: int) -> list[tuple[str, float]]:
    """For each of `count` workers in a row: its GPU, and its share of that GPU's memory."""
    return [
        (gpus[number % len(gpus)], 1 / len(range(number % len(gpus), count, len(gpus))))
        for number in range(count)
    ]
