"""A model in native memory and the steps that it runs, with numpy arrays on this side."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.errors import InternalError
from baton.native.library import (
    OPERATIONS,
    CBatch,
    CModelShape,
    CPool,
    CProfile,
    Weight,
    check,
    library,
)


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """One step. Its rows are the sequences' tokens one after the other, `queries[i]` of them at
    positions [starts[i], starts[i] + queries[i]) of sequence i.

    Lists, because after a step over all weights the processor's caches hold nothing of Python:
    what code a step runs counts, and numpy's is long.
    """

    tokens: list[int]  # [rows]
    queries: list[int]  # [sequences]
    starts: list[int]  # [sequences]
    blocks: list[int]  # the block tables one after the other
    table_sizes: list[int]  # [sequences] blocks of each table
    sampled: list[bool]  # [sequences] whether the logits of its last row are wanted


@dataclass(frozen=True, slots=True)
class Pool:
    """Pool memory `[num_blocks, layers, 2, kv_heads, block_size, head_dim]` bfloat16, that the
    caller keeps alive."""

    address: int
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Logits:
    """Of the sampled sequences, row by row. `values` `[sampled or more, vocab]` is valid until the
    model's next step."""

    values: npt.NDArray[np.float32]
    best: list[int]  # [sampled] first greatest; -1: a NaN, or no finite greatest


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds of thread 0 by operation since the last reading; its waits for other threads count
    as `waiting` only. `total_s` is the whole time inside of the library."""

    steps: int
    total_s: float
    seconds: dict[str, float]


def unfit(shape: CModelShape) -> str | None:
    """Why the native operations cannot run a shape (see `model_shape`); None if they can."""
    reason: bytes = library().baton_why_not(ctypes.byref(shape))
    return reason.decode() or None


class NativeModel:
    """Weights, workspace and threads of one model. Used by one thread at a time.

    `windows[layer]` in tokens, 0 for full attention. `cpus`, if any, is where thread i (0 is the
    caller's) is pinned. Weights are copied in by `load`, all of them before the first `forward`.
    """

    def __init__(
        self,
        shape: CModelShape,
        windows: Sequence[int],
        threads: int,
        cpus: Sequence[int] = (),
    ) -> None:
        handle = ctypes.c_void_p()
        check(
            library().baton_model_new(
                ctypes.byref(shape),
                (ctypes.c_int64 * len(windows))(*windows),
                threads,
                (ctypes.c_int32 * len(cpus))(*cpus),
                len(cpus),
                ctypes.byref(handle),
            )
        )
        self._vocab: int = shape.vocab
        self._layers: int = shape.layers
        self._handle = handle
        self._stride = -(-self._vocab // 16) * 16
        self._reserve(1)
        # At exit, threads may be inside of the library; the process takes everything with it.
        self._free = weakref.finalize(self, library().baton_model_free, handle)
        self._free.atexit = False

    def load(self, weight: Weight, layer: int, address: int, values: int) -> None:
        """Copy a weight of `values` elements, packed as the operations want it."""
        check(library().baton_model_load(self._opened(), weight, layer, address, values))

    def forward(
        self,
        batch: NativeBatch,
        pool: Pool,
        on_written: Callable[[int], None] | None = None,
        ends: Iterable[int] = (),
        before_read: Callable[[int], None] | None = None,
    ) -> Logits:
        """Write the KV of every token to the pool; return the logits that the batch wants.

        `on_written(end)` is called for each of `ends` (ascending) after the KV of layers [0, end)
        has been written; `before_read(end)` for each before KV in layers [0, end) is read, which it
        may put off. Raises InternalError for a batch that leaves vocabulary, positions or pool.
        """
        rows = sum(batch.sampled)
        if rows > len(self._best):
            self._reserve(max(rows, 2 * len(self._best)))
        numbers = _flat(batch)
        arguments = (
            _c_batch(batch, numbers.buffer_info()[0]),
            CPool(pool.address, pool.num_blocks, pool.block_size),
        )
        done = 0
        if on_written is not None or before_read is not None:
            for end in ends:
                if before_read is not None:
                    before_read(end)
                self._run(arguments, done, end)
                if on_written is not None:
                    on_written(end)
                done = end
        self._run(arguments, done, self._layers + 1)
        return Logits(self._values, self._best[:rows])

    def _reserve(self, rows: int) -> None:
        """Room for the logits of so many rows."""
        pages = _float32_pages(rows, self._stride)
        self._logits: int = pages.ctypes.data
        self._values = pages[:, : self._vocab]
        self._best = (ctypes.c_int64 * rows)()

    def _run(self, arguments: tuple[CBatch, CPool], begin: int, end: int) -> None:
        """Stages [begin, end), of which there is one more than layers: see `src/model.h`."""
        batch, pool = map(ctypes.byref, arguments)
        check(
            library().baton_model_forward(
                self._opened(), batch, pool, begin, end, self._logits, self._stride, self._best
            )
        )

    def profile(self) -> Profile:
        """What was counted since the last call."""
        counted = CProfile()
        library().baton_model_profile(self._opened(), ctypes.byref(counted))
        unit = counted.nanoseconds / counted.total * 1e-9 if counted.total else 0.0
        seconds = {name: n * unit for name, n in zip(OPERATIONS, counted.cycles, strict=True)}
        return Profile(counted.steps, counted.nanoseconds * 1e-9, seconds)

    def close(self) -> None:
        """End the threads and give the memory back. Idempotent. Logits stay readable."""
        self._free()

    def _opened(self) -> ctypes.c_void_p:
        if not self._free.alive:
            raise InternalError("the native model is closed")
        return self._handle


def _flat(batch: NativeBatch) -> array[int]:
    """All numbers of a batch, in the order of `CBatch`. Raises InternalError when they are not as
    many as they say, which the library cannot see."""
    sequences = len(batch.queries)
    if not sequences == len(batch.starts) == len(batch.table_sizes) == len(batch.sampled):
        raise InternalError("the parts of a native batch differ in their number of sequences")
    if sum(batch.table_sizes) != len(batch.blocks) or min(batch.table_sizes, default=0) < 0:
        raise InternalError("the block tables of a native batch are not as long as it says")
    numbers = array("i", batch.tokens)
    for part in (batch.queries, batch.starts, batch.table_sizes, batch.sampled, batch.blocks):
        numbers.extend(part)
    return numbers


def _c_batch(batch: NativeBatch, address: int) -> CBatch:
    rows, sequences, size = len(batch.tokens), len(batch.queries), ctypes.sizeof(ctypes.c_int32)
    queries = address + rows * size
    starts, table_sizes, sampled, blocks = (queries + n * sequences * size for n in (1, 2, 3, 4))
    return CBatch(rows, sequences, address, queries, starts, table_sizes, sampled, blocks)


def _float32_pages(rows: int, width: int) -> npt.NDArray[np.float32]:
    """`[rows, width]` in huge pages where there are some: logits are hundreds of KiB per row."""
    pages = mmap.mmap(-1, 4 * rows * width)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # costs speed only
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.float32).reshape(rows, width)
