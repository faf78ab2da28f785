"""Moves a step's input to the device in one copy, its tokens back in another, without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from baton.engine.flat import Array
from baton.engine.graph_backend import GraphBackend, Marker

_ALIGNMENT = 64
"""Bytes: kernels are compiled for pointers that divide by 16."""

STEPS = 3
"""Host buffers in turn: two steps are on their way at most, and one is being made."""

_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


def padded_bytes(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def views(memory: torch.Tensor, arrays: Sequence[Array]) -> list[torch.Tensor]:
    """Where `Uploads.send` puts arrays of these shapes within `memory` (uint8)."""
    ends = list(accumulate(padded_bytes(array.nbytes) for array in arrays))
    return [
        memory[begin : begin + array.nbytes].view(_TYPES[array.dtype]).view(array.shape)
        for array, begin in zip(arrays, [0, *ends], strict=False)
    ]


class Uploads:
    """Host memory that the device reads while the host makes the next step."""

    def __init__(self, backend: GraphBackend) -> None:
        self._backend = backend
        self._ring: list[tuple[torch.Tensor, Marker] | None] = [None] * STEPS
        self._next = 0

    def send(
        self, arrays: Sequence[Array], target: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Queue one copy of all arrays to `target` (uint8, large enough), or to new memory. Returns
        them on the device."""
        nbytes = sum(padded_bytes(array.nbytes) for array in arrays)
        host = self._host_memory(nbytes)
        flat = host.numpy()
        begin = 0
        for array in arrays:
            flat[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
            begin += padded_bytes(array.nbytes)
        if target is None:
            target = torch.empty(nbytes, dtype=torch.uint8, device=self._backend.device)
        target[:nbytes].copy_(host[:nbytes], non_blocking=True)
        self._ring[self._next] = (host, self._backend.mark())
        self._next = (self._next + 1) % STEPS
        return views(target, arrays)

    def _host_memory(self, nbytes: int) -> torch.Tensor:
        used = self._ring[self._next]
        if used is not None:
            host, copied = used
            copied.wait()  # three steps ago: as good as always over
            if len(host) >= nbytes:
                return host
        return self._backend.host_memory(max(4096, 1 << (nbytes - 1).bit_length()))


class Downloads:
    """Host memory that the device writes sampled tokens to."""

    def __init__(self, backend: GraphBackend, capacity: int) -> None:
        """`capacity`: int64 values of one step."""
        self._backend = backend
        self._ring = [backend.host_memory(8 * capacity).view(torch.int64) for _ in range(STEPS)]
        self._next = 0

    def fetch(self, values: torch.Tensor) -> tuple[torch.Tensor, Marker]:
        """Queue a copy of `values` (int64). It is there when the marker has been passed, and valid
        for two more calls."""
        host = self._ring[self._next][: values.numel()].view(values.shape)
        self._next = (self._next + 1) % STEPS
        host.copy_(values, non_blocking=True)
        return host, self._backend.mark()
