"""The choice of tokens in Triton: argmax over logits plus Gumbel noise that is hashed, not stored.

`choose` is `baton.kernels.reference_rows.choose` without waiting for the GPU: one kernel finds the
best of every stretch of the vocabulary, a second one the best of those. The noise has the bits of
`baton.kernels.noise`; its two logarithms are in float64, where devices differ by far less than the
distance between any two candidates' scores.
"""

from __future__ import annotations

import torch

from baton.errors import InternalError
from baton.kernels import noise
from baton.kernels.jit import constant, jit, on_device_of, tl

_CHUNK = 2048
"""Logits that one program looks at."""

_WEYL = constant(noise.signed(noise.WEYL))
_MIX_A = constant(noise.signed(noise.MIX_A))
_MIX_B = constant(noise.signed(noise.MIX_B))


def choose(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    starts: torch.Tensor,
    tokens: torch.Tensor,
    finite: torch.Tensor,
) -> None:
    rows, vocab = logits.shape
    if logits.stride(1) != 1 or not all(
        part.shape == (rows,) and part.is_contiguous()
        for part in (temperatures, starts, tokens, finite)
    ):
        raise InternalError(f"the operands of sampling do not fit {rows} rows of logits")
    if rows == 0:
        return
    chunks = -(-vocab // _CHUNK)
    scores = torch.empty((rows, chunks), dtype=torch.float64, device=logits.device)
    ids = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    highest = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    with on_device_of(logits):
        _best_of_chunk[(rows, chunks)](
            logits,
            temperatures,
            starts,
            scores,
            ids,
            highest,
            logits.stride(0),
            VOCAB=vocab,
            CHUNK=_CHUNK,
            num_warps=8,
        )
        _best_of_row[(rows,)](
            scores,
            ids,
            highest,
            tokens,
            finite,
            CHUNKS=chunks,
            PADDED=max(16, 1 << (chunks - 1).bit_length()),
            num_warps=1,
        )


@jit
def _gumbel(start: tl.tensor, token: tl.tensor) -> tl.tensor:
    """Minus the Gumbel noise of tokens (int64): `log(-log(uniform))`, float64."""
    bits = (token + 1) * _WEYL + start
    bits ^= (bits >> 30) & ((1 << 34) - 1)
    bits *= _MIX_A
    bits ^= (bits >> 27) & ((1 << 37) - 1)
    bits *= _MIX_B
    bits ^= (bits >> 31) & ((1 << 33) - 1)
    uniform = (((bits >> 12) & ((1 << 52) - 1)).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return tl.log(-tl.log(uniform))


@jit
def _best_of_chunk(
    logits: tl.tensor,
    temperatures: tl.tensor,
    starts: tl.tensor,
    scores: tl.tensor,
    ids: tl.tensor,
    highest: tl.tensor,
    logits_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program: CHUNK tokens of one row. `highest` is its best logit, infinite with a NaN."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    live = token < VOCAB
    values = tl.load(logits + row * logits_stride + token, mask=live, other=float("-inf"))
    values = values.to(tl.float32)
    temperature = tl.load(temperatures + row)
    noisy = temperature > 0
    # The division is IEEE's: the host's, and what two workers agree on.
    scaled = tl.div_rn(values, tl.where(noisy, temperature, 1.0) + tl.zeros_like(values))
    score = scaled.to(tl.float64)
    if noisy:
        score -= _gumbel(tl.load(starts + row), token.to(tl.int64))
    is_nan = values != values
    score = tl.where(live & (is_nan == 0), score, float("-inf"))
    best, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    slot = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(scores + slot, best)
    tl.store(ids + slot, tl.program_id(1) * CHUNK + at)
    top = tl.max(tl.where(is_nan, float("inf"), values), 0)
    tl.store(highest + slot, top)


@jit
def _best_of_row(
    scores: tl.tensor,
    ids: tl.tensor,
    highest: tl.tensor,
    tokens: tl.tensor,
    finite: tl.tensor,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """One program: one row. The chunks are in order, so the first best has the lowest id."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, PADDED)
    live = chunk < CHUNKS
    score = tl.load(scores + row * CHUNKS + chunk, mask=live, other=float("-inf"))
    _, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens + row, tl.load(ids + row * CHUNKS + at).to(tl.int64))
    top = tl.max(tl.load(highest + row * CHUNKS + chunk, mask=live, other=float("-inf")), 0)
    tl.store(finite + row, (tl.abs(top) < float("inf")).to(tl.int64))
