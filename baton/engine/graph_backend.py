"""The seam to a device with a queue: recording work, copying to it, and marking places in it.

`CudaBackend` records CUDA graphs. `HostBackend` stands in for it where there is no GPU: its queue
is always empty, and a recording is the function itself, run again over the same buffers. So all
that a recording relies on (fixed shapes, buffers that stay in place, no values read on the host)
can be tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Marker(Protocol):
    """A place in the device's queue."""

    def wait(self) -> None:
        """Block until the device has got there. From any thread."""


class GraphBackend(Protocol):
    """One device and the queue that a runner uses. Not for several threads at once."""

    device: torch.device

    def active(self) -> AbstractContextManager[object]:
        """Whatever is launched inside goes to this queue, in order."""

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """uint8 on the host, that the device copies from and to on its own."""

    def mark(self) -> Marker:
        """The end of the queue as it is now."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Something that does the device work of `step` again, on the same memory.

        `step` is called more than once. Only one recording may run at a time: they share the memory
        of what is between their inputs and outputs.
        """


class CudaBackend:
    """A stream of its own: one that no other work on the device waits for, or is waited for by. KV
    transfers and digests use other streams and so overlap with the model."""

    def __init__(self, device: str) -> None:
        """Waits for what was queued on the device before: the pool's zeroes, say."""
        self.device = torch.device(device)
        torch.cuda.synchronize(self.device)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def host_memory(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Marker:
        # Blocking: who waits sleeps, and does not burn a core until the step ends.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _CudaMarker(event)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        step()  # compiles kernels, makes workspaces: nothing that may happen during a capture
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: what they do is not part of this.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            step()
        return graph.replay


class _CudaMarker:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class HostBackend:
    """A device that has done everything at once."""

    device = torch.device("cpu")

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def host_memory(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self) -> Marker:
        return _Passed()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step


class _Passed:
    def wait(self) -> None:
        return
