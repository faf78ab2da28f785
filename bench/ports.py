"""Ports for processes that are about to start."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 20_000  # Ray's own workers take those from 10,002 to 19,999
_given: set[int] = set()
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A free TCP port of loopback, below those that the kernel hands out by itself: between this
    and the start of who is told of it, nobody is given it by chance. Another one at each call."""
    end = int(_RANGE.read_text().split()[0])
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(_LOWEST, end) if end - _LOWEST > 1_000 else 0
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            port = int(probe.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port
