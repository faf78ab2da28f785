"""Whether strangers can reach a conductor that asks nobody for a key."""

from __future__ import annotations

import ipaddress
import logging

from conductor.config import ConductorConfig

log = logging.getLogger(__name__)


def warn_when_open(config: ConductorConfig) -> None:
    """Say so once, at the start."""
    if not config.tenancy.is_open:
        return
    hosts = dict.fromkeys((config.host, config.grpc_host or config.host))
    open_to = [host for host in hosts if not is_loopback(host)]
    if open_to:
        log.warning(
            "whoever reaches %s may use this cluster: no API key is asked for. Give --keys and "
            "--tenants, or --api-key; see docs/security.md",
            " and ".join(open_to),
        )


def is_loopback(host: str) -> bool:
    """Of an address to listen on; a name counts as one only when it is `localhost`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
