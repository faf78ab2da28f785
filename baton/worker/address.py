"""host:port of servers: what was given, what was bound, what others dial."""

from __future__ import annotations

import socket


def reachable_address(advertise: str, bound: str) -> str:
    """What others dial: `advertise` (with the bound port if it has none), else what was bound,
    with this host's name in place of "every interface"."""
    host, _, port = bound.rpartition(":")
    if advertise:
        return advertise if is_address(advertise) else f"{advertise}:{port}"
    if host in ("0.0.0.0", "[::]"):
        return f"{socket.getfqdn()}:{port}"
    return bound


def is_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon) and port.isdecimal() and int(port) < 65536
