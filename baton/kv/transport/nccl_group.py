"""A two-rank process group between a source (rank 0) and a reader (rank 1). Blocking torch calls.

NCCL for CUDA pools, gloo for pools on the CPU. Everything here runs in a pair's own thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from baton.kv.transport.reach import listen_at

dist: Any = torch.distributed  # its classes come from C++ and have no complete stubs

SOURCE, READER = 0, 1
TIMEOUT_S = 30.0  # of every blocking call

Span = tuple[int, int]
"""(offset, length) in a pool, bytes."""


def make_store(host: str) -> Any:
    """The source's rendezvous (a TCPStore), on a free port. Blocks for milliseconds."""
    listening = listen_at(host)
    return dist.TCPStore(
        host,
        listening.getsockname()[1],
        None,
        True,
        timedelta(seconds=TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),  # it would listen at every interface
    )


def join_store(host: str, port: int) -> Any:
    return dist.TCPStore(host, port, None, False, timedelta(seconds=TIMEOUT_S))


def pool_tensor(buffer: object, device: str) -> torch.Tensor:
    """The pool as bytes [nbytes]; shares its memory."""
    if device == "cpu":
        return torch.frombuffer(buffer, dtype=torch.uint8)
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"a pool on {device} is a tensor, not {type(buffer).__name__}")
    return buffer


class PairGroup:
    """Ordered sends and receives between the two ranks. Use from one thread."""

    def __init__(self, store: Any, rank: int, host: str, pool: torch.Tensor) -> None:
        self._pool = pool
        self._other = READER if rank == SOURCE else SOURCE
        self._store = store  # the source's must outlive the group
        self._group = _make_group(store, rank, host, pool.device)

    def send(self, spans: Sequence[Span]) -> None:
        """Raises RuntimeError when the reader has gone or does not receive in time."""
        self._finish([self._group.send([self._part(s)], self._other, 0) for s in spans])

    def receive(self, spans: Sequence[Span]) -> None:
        """Return when the bytes are in the pool. Raises RuntimeError as `send` does."""
        self._finish([self._group.recv([self._part(s)], self._other, 0) for s in spans])

    def _part(self, span: Span) -> torch.Tensor:
        return self._pool[span[0] : span[0] + span[1]]

    def _finish(self, works: list[Any]) -> None:
        for work in works:
            work.wait()
        if self._pool.is_cuda:  # NCCL's wait only orders streams
            torch.cuda.current_stream(self._pool.device).synchronize()


def _make_group(store: Any, rank: int, host: str, device: torch.device) -> Any:
    prefixed = dist.PrefixStore("kv", store)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timedelta(seconds=TIMEOUT_S)
        return dist.ProcessGroupNCCL(prefixed, rank, 2, nccl)
    gloo = dist.ProcessGroupGloo._Options()
    gloo._timeout = timedelta(seconds=TIMEOUT_S)
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(prefixed, rank, 2, gloo)
