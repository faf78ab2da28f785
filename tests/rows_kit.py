"""Checks of the row-wise kernels against formulas in float64, for any device and type."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baton.kernels import noise
from baton.kernels.dispatch import Kernels

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
CHOICES = [(1, 100), (3, 2048), (4, 5001), (0, 100)]


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), expected, rtol=tolerance, atol=tolerance, check_device=False
    )


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    scale = (x.double().pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
    return x.double() * scale * weight.double()


def check_rms_norm(
    kernels: Kernels, rows: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    x, weight = (random(n, size, dtype=dtype, device=device, seed=n) for n in (rows, 1))
    assert_close(kernels.rms_norm(x, weight[0], EPS), _normed(x, weight[0]), dtype)


def check_add_rms_norm(
    kernels: Kernels, rows: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    hidden = random(rows, size, dtype=dtype, device=device)
    delta = random(rows, size, dtype=dtype, device=device, seed=1)
    (weight,) = random(1, size, dtype=dtype, device=device, seed=2)
    expected = hidden + delta
    total, normed = kernels.add_rms_norm(hidden, delta, weight, EPS)
    assert torch.equal(total, expected)
    assert_close(normed, _normed(expected, weight), dtype)


def check_silu_mul(
    kernels: Kernels, rows: int, size: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    gate_up = 4 * random(rows, 2 * size, dtype=dtype, device=device)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(kernels.silu_mul(gate_up), gate * gate.sigmoid() * up, dtype)


@dataclass(frozen=True, slots=True)
class Projected:
    """A step's projected rows."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    norm: bool

    def __str__(self) -> str:
        norm = "-norm" if self.norm else ""
        return f"{self.tokens}x{self.heads}+{self.kv_heads}x{self.head_dim}{norm}"


SHAPES = [
    Projected(1, 1, 1, 16, 16, norm=False),
    Projected(7, 4, 2, 32, 16, norm=True),
    Projected(5, 14, 2, 80, 32, norm=False),
    Projected(3, 9, 3, 96, 64, norm=True),
    Projected(2, 32, 8, 128, 16, norm=True),
    Projected(2, 8, 1, 256, 16, norm=False),
    Projected(0, 4, 2, 32, 16, norm=True),
]


def check_norm_rope_write(
    kernels: Kernels, shape: Projected, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Every other slot of three blocks, the second token skipped as padding is."""
    layers, layer = 3, 1
    heads = shape.heads + 2 * shape.kv_heads
    # As a slice of a wider tensor: rows need not follow one another.
    qkv = random(shape.tokens, heads + 1, shape.head_dim, dtype=dtype, device=device)[:, :heads]
    qk = shape.heads + shape.kv_heads
    norm = random(qk, shape.head_dim, dtype=dtype, device=device, seed=1) if shape.norm else None
    angles = 9 * random(
        shape.tokens, 1, shape.head_dim // 2, dtype=torch.float32, device=device, seed=2
    )
    rotation = torch.stack((angles.cos(), angles.sin()))
    pool = random(
        3, layers, 2, shape.kv_heads, shape.block_size, shape.head_dim, dtype=dtype, device=device
    )
    slots = 2 * torch.arange(shape.tokens, device=device) + shape.block_size
    slots[1:2] = -1
    expected = pool.clone()

    q = kernels.norm_rope_write(qkv, norm, EPS, rotation, pool, layer, slots)

    both = qkv[:, :qk].double()
    if norm is not None:
        both = _normed(qkv[:, :qk], norm)
    a, b = both.chunk(2, dim=-1)
    cos, sin = rotation.double()
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    assert q.is_contiguous()
    assert_close(q, rotated[:, : shape.heads], dtype)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, shape.block_size)
            keys = pool[block, layer, 0, :, offset]
            assert_close(keys, rotated[token, shape.heads :], dtype)
            expected[block, layer, 0, :, offset] = keys
            expected[block, layer, 1, :, offset] = qkv[token, qk:]
    assert torch.equal(pool, expected)  # values to the bit, and nothing else touched


def check_choose(
    kernels: Kernels, rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Greedy and noisy rows in turns, against the formula on the CPU."""
    logits = 3 * random(rows, vocab, dtype=dtype, device=device)
    temperatures = [0.0 if row % 2 else 0.5 + row / 4 for row in range(rows)]
    starts = [noise.stream_start(2**63 + row, 5) for row in range(rows)]
    tokens, finite = torch.full((2, rows), -1, dtype=torch.int64, device=device)
    kernels.choose(
        logits,
        torch.tensor(temperatures, dtype=torch.float32, device=device),
        torch.tensor(starts, dtype=torch.int64, device=device),
        tokens,
        finite,
    )
    assert finite.tolist() == [1] * rows
    ids = torch.arange(vocab)
    for row, scores in enumerate(logits.float().cpu()):
        if temperatures[row]:
            gumbel = -(-noise.uniform(starts[row], ids).log()).log()
            scores = scores / torch.tensor(temperatures[row]) + gumbel
        assert int(tokens[row]) == int(scores.argmax())
