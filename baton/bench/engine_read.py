"""Reading device memory as fast as a kernel can: the ceiling of everything bound by memory."""

from __future__ import annotations

import torch

from baton.kernels.jit import jit, on_device_of, tl

_CHUNK = 8192
_PROGRAMS = 4096


def read_all(words: torch.Tensor, programs: int = _PROGRAMS) -> torch.Tensor:
    """Partial sums of `words` (1-d float32): every one is read once, almost nothing is written."""
    sums = torch.empty(programs, dtype=torch.float32, device=words.device)
    chunks = -(-len(words) // (_CHUNK * programs))
    with on_device_of(words):
        _read[(programs,)](words, sums, len(words), chunks, chunk=_CHUNK, num_warps=8)
    return sums


@jit
def _read(
    words: tl.tensor, sums: tl.tensor, count: tl.tensor, chunks: tl.tensor, chunk: tl.constexpr
) -> None:
    """One program: every `num_programs`-th chunk, summed element by element."""
    program = tl.program_id(0)
    stride = tl.num_programs(0).to(tl.int64) * chunk
    at = program.to(tl.int64) * chunk + tl.arange(0, chunk)
    total = tl.zeros((chunk,), dtype=tl.float32)
    for _ in range(chunks):
        total += tl.load(words + at, mask=at < count, other=0.0)
        at += stride
    tl.store(sums + program, tl.sum(total))
