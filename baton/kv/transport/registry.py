"""Transports by name, and which of them work on this machine."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass

from baton.errors import ConfigError
from baton.kv.transport.base import Transport
from baton.kv.transport.loopback import LoopbackFabric, LoopbackTransport
from baton.kv.transport.nixl import NixlTransport, make_agent
from baton.kv.transport.reach import is_loopback, keep_ucx_here
from baton.kv.transport.shm import ShmTransport

NAMES = ("nixl", "nccl", "shm", "loopback")


@dataclass(frozen=True, slots=True)
class Availability:
    """One transport on this machine. `reason` says why not, or what it is good for."""

    name: str
    usable: bool
    reason: str


def make_transport(
    name: str,
    worker_name: str,
    *,
    host: str = "127.0.0.1",
    fabric: LoopbackFabric | None = None,
) -> Transport:
    """A transport that is not started yet.

    `auto` is nixl where its UCX backend works, else shm. `host` is where peers reach this process:
    on loopback, nobody else does. `fabric` connects the loopback transports of one process.
    Raises ConfigError for an unknown name.
    """
    if is_loopback(host):
        keep_ucx_here()
    match name:
        case "auto":
            chosen = "nixl" if _nixl().usable else "shm"
            return make_transport(chosen, worker_name, host=host)
        case "nixl":
            return NixlTransport(worker_name)
        case "nccl":
            from baton.kv.transport.nccl import NcclTransport  # imports torch

            return NcclTransport(worker_name, host)
        case "shm":
            return ShmTransport(worker_name)
        case "loopback" if fabric is not None:
            return LoopbackTransport(worker_name, fabric)
        case "loopback":
            raise ConfigError("transport loopback works inside one process only; use shm")
    raise ConfigError(f"unknown transport {name!r}; choose one of auto, {', '.join(NAMES)}")


def available() -> tuple[Availability, ...]:
    """All transports, with reasons. Makes a NIXL agent to see whether its UCX backend works."""
    return (
        _nixl(),
        _nccl(),
        _shm(),
        Availability("loopback", True, "inside one process: tests and simulation"),
    )


def _nixl() -> Availability:
    if importlib.util.find_spec("nixl") is None:
        return Availability("nixl", False, "not installed; pip install 'baton-llm[nixl]'")
    try:
        make_agent(f"probe/{os.getpid()}")
    except Exception as error:
        return Availability("nixl", False, f"its UCX backend does not start: {error}")
    return Availability("nixl", True, "UCX: RDMA, NVLink, CMA or TCP, whichever UCX finds")


def _nccl() -> Availability:
    if importlib.util.find_spec("torch") is None:
        return Availability("nccl", False, "torch is not installed")
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available() and dist.is_nccl_available():
        return Availability("nccl", True, "NCCL between GPUs")
    if dist.is_available() and dist.is_gloo_available():
        return Availability("nccl", True, "gloo over TCP, because there is no GPU")
    return Availability("nccl", False, "this torch has neither NCCL nor gloo")


def _shm() -> Availability:
    if sys.platform != "linux":
        return Availability("shm", False, "needs Linux (memfd and /proc)")
    return Availability("shm", True, "between processes of one user on one host")
