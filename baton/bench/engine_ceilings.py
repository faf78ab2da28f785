"""What the machine could do at most: the rates that phases and kernels are compared with.

A ceiling is the best of several repetitions and, for products, of several sizes and libraries: what
anything on this machine has been seen to reach, not what a data sheet says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from baton.bench.engine_cost import Work
from baton.bench.engine_device import Device
from baton.bench.engine_native import native_products, native_reads
from baton.bench.engine_rate import Rate
from baton.bench.engine_read import read_all
from baton.model.weights import TORCH_DTYPES

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time that work takes, and which ceiling says so."""

    seconds: float
    by: str  # "matrix" | "memory"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Products in the dtype of the model; copies count bytes read plus bytes written."""

    products: tuple[Rate, ...]
    reads: tuple[Rate, ...]  # ascending in nbytes
    copies: tuple[Rate, ...]

    @property
    def matrix_per_s(self) -> float:
        return max(rate.per_s for rate in self.products if rate.counts)

    @property
    def copy_per_s(self) -> float:
        return max(rate.per_s for rate in self.copies if rate.counts)

    def read_per_s(self, nbytes: int) -> float:
        """Of a working set of `nbytes`: a small one may fit into a cache, so it is compared with
        the largest measured one that is not larger."""
        fitting = [rate for rate in self.reads if rate.nbytes <= nbytes] or [self.reads[0]]
        size = fitting[-1].nbytes
        return max(rate.per_s for rate in fitting if rate.nbytes == size and rate.counts)

    def memory_s(self, work: Work) -> float:
        """What is read and written in equal parts moves at the rate of a copy, and so does what is
        written beyond that; what is read beyond that, at the rate of reading."""
        paired = 2 * work.written
        read = max(0, work.read - work.written)
        return paired / self.copy_per_s + read / self.read_per_s(work.read)

    def bound(self, work: Work) -> Bound:
        matrix, memory = work.flops / self.matrix_per_s, self.memory_s(work)
        return Bound(matrix, "matrix") if matrix > memory else Bound(memory, "memory")

    def moved(self, later: Ceilings) -> dict[str, float]:
        """What a second measurement found over what this one did."""
        size = self.reads[-1].nbytes
        return {
            "products": later.matrix_per_s / self.matrix_per_s,
            "reading": later.read_per_s(size) / self.read_per_s(size),
            "copying": later.copy_per_s / self.copy_per_s,
        }

    def best(self, other: Ceilings) -> Ceilings:
        """The better of two measurements of the same rates: what a busy machine could do twice."""
        return Ceilings(
            _best(self.products, other.products),
            _best(self.reads, other.reads),
            _best(self.copies, other.copies),
        )


def _best(one: tuple[Rate, ...], other: tuple[Rate, ...]) -> tuple[Rate, ...]:
    return tuple(max(pair, key=lambda rate: rate.per_s) for pair in zip(one, other, strict=True))


def measure_ceilings(device: Device, dtype: str, budget_s: float, quick: bool) -> Ceilings:
    """About `budget_s` seconds for each of a dozen rates; `quick` takes small sizes."""
    torch.set_num_threads(device.threads)  # a native runner leaves torch with one
    products = [*_products(device, TORCH_DTYPES[dtype], budget_s, quick)]
    reads = [*_reads(device, budget_s, quick)]
    if not device.is_cuda:
        reads += native_reads(device.threads, _sizes(device, quick), budget_s)
        if dtype == "bfloat16":
            products += native_products(device.threads, budget_s, quick)
    reads.sort(key=lambda rate: rate.nbytes)
    return Ceilings(tuple(products), tuple(reads), tuple(_copies(device, budget_s, quick)))


def _products(device: Device, dtype: torch.dtype, budget_s: float, quick: bool) -> Iterator[Rate]:
    """torch's, `[rows, depth] x [depth, out]`."""
    if quick:
        shapes = [(256, 512, 512)]
    elif device.is_cuda:
        shapes = [(4096, 4096, 4096), (8192, 8192, 8192), (16_384, 8192, 4096)]
    else:
        shapes = [(512, 4096, 4096), (2048, 4096, 4096), (1024, 8192, 2048)]
    for rows, out, depth in shapes:
        # Random: multiplying zeros takes less power, so a GPU would run at higher clocks.
        left = torch.randn(rows, depth, device=device.name).to(dtype)
        right = torch.randn(out, depth, device=device.name).to(dtype).T
        result = torch.empty(rows, out, dtype=dtype, device=device.name)
        with torch.inference_mode():
            timing = device.time(lambda: torch.mm(left, right, out=result), budget_s)  # noqa: B023
        yield Rate(f"torch product {rows}x{out}x{depth}", 2 * rows * out * depth / timing.best_s)


def _sizes(device: Device, quick: bool) -> list[int]:
    """Bytes, ascending."""
    if quick:
        return [8 * _MIB]
    if device.is_cuda:
        return [256 * _MIB, 2048 * _MIB]
    return [size * _MIB for size in (32, 64, 128, 256, 1024)]  # some may fit into a cache


def _reads(device: Device, budget_s: float, quick: bool) -> Iterator[Rate]:
    for nbytes in _sizes(device, quick):
        words = torch.ones(nbytes // 4, dtype=torch.float32, device=device.name)
        timing = device.time(words.sum, budget_s)
        yield Rate(f"torch sum of {nbytes // _MIB} MiB", nbytes / timing.best_s, nbytes)
        if device.is_cuda:
            timing = device.time(lambda: read_all(words), budget_s)  # noqa: B023
            yield Rate(f"Triton read of {nbytes // _MIB} MiB", nbytes / timing.best_s, nbytes)


def _copies(device: Device, budget_s: float, quick: bool) -> Iterator[Rate]:
    nbytes = _sizes(device, quick)[-1] // 2
    source = torch.ones(nbytes, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    timing = device.time(lambda: target.copy_(source), budget_s)
    yield Rate(f"torch copy of {nbytes // _MIB} MiB", 2 * nbytes / timing.best_s, 2 * nbytes)
