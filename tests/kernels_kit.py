"""Paged pools with known contents, a naive attention to compare with, and the sweep of shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from baton.kernels import reference
from baton.kernels.dispatch import Kernels

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
GROUPS = (1, 2, 4, 7, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
WINDOWS = (0, 1, 20, 70)
KV_HEADS = (1, 2)
SCALE = 0.11
LAYERS = 2

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest absolute error: two to four roundings of values below 4."""


@dataclass(frozen=True, slots=True)
class Case:
    head_dim: int
    group: int
    block_size: int
    window: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    kv_heads: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lengths = "+".join(map(str, self.lengths))
        return (
            f"{dtype}-head{self.head_dim}-group{self.group}x{self.kv_heads}"
            f"-block{self.block_size}-window{self.window}-len{lengths}"
        )

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads


def sweep(dtypes: tuple[torch.dtype, torch.dtype]) -> list[Case]:
    """30 cases in which every pair of values of any two parameters occurs (a test checks that).

    6 head sizes x 5 groups in full; the other parameters are linear in these two.
    """
    cases = []
    for number in range(len(HEAD_DIMS) * len(GROUPS)):
        head, group, turn = number % 6, number % 5, number // 6
        block_size = BLOCK_SIZES[(head + group) % 5]
        boundary = ((1, block_size + 1), (block_size - 1, block_size), (block_size * 3 // 2, 3))
        cases.append(
            Case(
                head_dim=HEAD_DIMS[head],
                group=GROUPS[group],
                block_size=block_size,
                window=WINDOWS[turn % 4],
                dtype=dtypes[(head + turn) % 2],
                lengths=boundary[(2 * head + turn) % 3],
                kv_heads=KV_HEADS[(head + group) % 2],
            )
        )
    return cases


@dataclass(frozen=True, slots=True)
class Filled:
    """A pool that holds K and V of some sequences in one layer, and NaN everywhere else."""

    kv: torch.Tensor
    layer: int
    block_tables: torch.Tensor  # int32, -1 after the last block of a sequence
    keys: list[torch.Tensor]  # of each sequence, [length, kv_heads, head_dim]
    values: list[torch.Tensor]
    slots: list[torch.Tensor]


def fill(case: Case, device: str = "cpu", seed: int = 0) -> Filled:
    """Random K and V in scattered blocks."""
    generator = torch.Generator().manual_seed(seed)
    width = max(-(-length // case.block_size) for length in case.lengths) + 1
    batch = len(case.lengths)
    shape = (batch * width + 1, LAYERS, 2, case.kv_heads, case.block_size, case.head_dim)
    kv = torch.full(shape, math.nan, dtype=case.dtype, device=device)
    tables = torch.randperm(shape[0], generator=generator)[: batch * width].view(batch, width)
    layer = LAYERS - 1
    filled = Filled(kv, layer, tables.to(torch.int32).to(device), [], [], [])
    for row, length in enumerate(case.lengths):
        both = torch.randn(
            2, length, case.kv_heads, case.head_dim, dtype=torch.float32, generator=generator
        )
        k, v = both.to(case.dtype).to(device)
        position = torch.arange(length)
        slots = tables[row, position // case.block_size] * case.block_size
        slots = (slots + position % case.block_size).to(device)
        reference.kv_write(k, v, kv, layer, slots)
        filled.keys.append(k)
        filled.values.append(v)
        filled.slots.append(slots)
        filled.block_tables[row, -(-length // case.block_size) :] = -1
    return filled


def random_queries(case: Case, tokens: int, device: str = "cpu", seed: int = 1) -> torch.Tensor:
    """`[tokens, heads, head_dim]`, a slice of a wider tensor as a fused QKV product gives it."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(tokens, case.heads + 2, case.head_dim, generator=generator)
    return fused.to(case.dtype).to(device)[:, 1:-1]


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float = SCALE
) -> torch.Tensor:
    """Dense attention in float64 of the last `len(q)` positions of one sequence."""
    tokens, heads, _ = q.shape
    length, kv_heads, _ = k.shape
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    position = torch.arange(length - tokens, length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)[None, :]
    hidden = key > position
    if window:
        hidden |= key <= position - window
    for head in range(heads):
        kv_head = head * kv_heads // heads
        scores = q[:, head].double() @ k[:, kv_head].double().T * scale
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        out[:, head] = weights @ v[:, kv_head].double()
    return out


def int32(values: list[int], device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def decode(
    kernels: Kernels, case: Case, filled: Filled, q: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    return kernels.attention_decode(
        q,
        filled.kv,
        filled.layer,
        filled.block_tables,
        int32(lengths, q.device),
        SCALE,
        case.window,
    )


def prefill(
    kernels: Kernels, case: Case, filled: Filled, q: torch.Tensor, chunks: list[int]
) -> torch.Tensor:
    """Attention of the last `chunks[b]` tokens of every sequence."""
    starts = [sum(chunks[:row]) for row in range(len(chunks) + 1)]
    contexts = [length - chunk for length, chunk in zip(case.lengths, chunks, strict=True)]
    return kernels.attention_prefill(
        q,
        filled.kv,
        filled.layer,
        filled.block_tables,
        int32(starts, q.device),
        int32(contexts, q.device),
        SCALE,
        case.window,
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def check_case(kernels: Kernels, case: Case, device: str = "cpu") -> None:
    """Decode, and prefill of chunks behind contexts of all kinds, against naive attention."""
    filled = fill(case, device)
    sequences = list(zip(filled.keys, filled.values, strict=True))
    q = random_queries(case, len(case.lengths), device)
    expected = [naive(q[b : b + 1], k, v, case.window) for b, (k, v) in enumerate(sequences)]
    assert_close(
        decode(kernels, case, filled, q, list(case.lengths)), torch.cat(expected), case.dtype
    )

    # A few tiles of tokens, behind a context; all of a short sequence, without one.
    most = 2 + 40 // case.group
    chunks = [min(length, most) for length in case.lengths]
    parts = random_queries(case, sum(chunks), device).split_with_sizes(chunks)
    expected = [naive(p, k, v, case.window) for p, (k, v) in zip(parts, sequences, strict=True)]
    q = random_queries(case, sum(chunks), device)
    assert_close(prefill(kernels, case, filled, q, chunks), torch.cat(expected), case.dtype)
