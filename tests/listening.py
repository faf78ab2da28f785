"""Where processes listen, by what the kernel says: no port of theirs can be forgotten."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True, slots=True, order=True)
class Port:
    pid: int
    host: str
    port: int

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return ip_address(self.host).is_loopback


def tcp_ports(pids: Iterable[int]) -> set[Port]:
    return {
        Port(pid, host, port)
        for pid in pids
        for inode, host, port in _listening(pid)
        if inode in _sockets(pid)
    }


def _sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            found.add(target[len("socket:[") : -1])
    return found


def _listening(pid: int) -> Iterable[tuple[str, str, int]]:
    """(inode, host, port) of all in the process's network namespace."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                host, _, port = fields[1].partition(":")
                yield fields[9], _host(host), int(port, 16)


def _host(raw: str) -> str:
    """The kernel prints 32-bit words as this machine orders their bytes."""
    words = [int(raw[at : at + 8], 16) for at in range(0, len(raw), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    address = IPv6Address(packed)
    return str(address.ipv4_mapped or address)
