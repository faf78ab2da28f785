"""Which transport a worker moves KV by."""

from __future__ import annotations

from importlib.util import find_spec

from baton.errors import ConfigError
from baton.kv.transport.base import Transport


def choose_transport(name: str) -> str:
    """`auto` is NIXL where it is installed, else shared memory (one host only)."""
    if name != "auto":
        return name
    return "nixl" if find_spec("nixl") else "shm"


def make_transport(name: str, worker: str, host: str) -> Transport:
    """A transport that is not started. `worker` names this life of this worker, `host` is where
    its peers reach it. Raises ConfigError when the transport is not installed.

    Imported one by one: each brings libraries that the others do not need.
    """
    if name == "shm":
        from baton.kv.transport.shm import ShmTransport

        return ShmTransport(worker)
    if name == "nixl":
        from baton.kv.transport.nixl import NixlTransport

        return NixlTransport(worker)
    if name == "nccl":
        from baton.kv.transport.nccl import NcclTransport

        return NcclTransport(worker, host)
    raise ConfigError(f"there is no transport {name!r}: choose auto, nixl, nccl or shm")
