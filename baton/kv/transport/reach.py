"""Who can reach what NIXL and torch listen at. Neither asks a caller who it is.

UCX, under NIXL, listens at every network interface, and does what those that connect say. So does
torch's TCPStore, whatever host it is told. Where all peers are on this machine, nobody else needs
to get that far.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

UCX_DEVICES = "UCX_NET_DEVICES"
_INTERFACES = Path("/sys/class/net")
_UP, _LOOPBACK = 0x1, 0x8  # flags of an interface (linux/if.h)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def keep_ucx_here() -> None:
    """Let UCX listen at loopback only, in this process and those that it starts; RDMA devices stay.
    What UCX_NET_DEVICES says already counts more. Before the first agent is made."""
    if others := _interfaces():
        os.environ.setdefault(UCX_DEVICES, "^" + ",".join(others))


def listen_at(host: str) -> socket.socket:
    """A listening socket on a free port of `host`, and nowhere else. Raises OSError."""
    found = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    return socket.create_server(address[:2], family=family)


def _interfaces() -> list[str]:
    """Those that are up and lead elsewhere: UCX warns of others when they are named."""
    found = []
    for interface in sorted(_INTERFACES.glob("*")):
        try:
            flags = int((interface / "flags").read_text(), 16)
        except (OSError, ValueError):
            continue
        if flags & _UP and not flags & _LOOPBACK:
            found.append(interface.name)
    return found
