"""The random numbers of sampling: one per (seed, output index, token id), the same everywhere.

An output position's stream is SplitMix64 (Steele, Lea and Flood, OOPSLA'14) from a start that
BLAKE2b makes of seed and index; the number of token t is the top 52 bits of the stream's element t.
Part of the wire contract: every worker of a cluster must draw the same, on whatever device. The
Triton version is in `baton.kernels.sampling`.
"""

from __future__ import annotations

import hashlib

import torch

WEYL, MIX_A, MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64's increment and multipliers."""


def stream_start(seed: int, index: int) -> int:
    """Where the stream of an output position starts: a signed 64 bit number. `seed` and `index` are
    unsigned 64 bit."""
    key = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    digest = hashlib.blake2b(key, digest_size=8, person=b"baton.sample").digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(start: int | torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The numbers of `tokens` (ids, int64) in the stream from `start`: float64 in (0, 1)."""
    # int64 arithmetic wraps around as the algorithm wants; only shifts need their sign bits off.
    bits = (tokens + 1) * signed(WEYL) + start
    bits ^= _shifted(bits, 30)
    bits *= signed(MIX_A)
    bits ^= _shifted(bits, 27)
    bits *= signed(MIX_B)
    bits ^= _shifted(bits, 31)
    return _shifted(bits, 12).double().add_(0.5).mul_(2.0**-52)


def signed(constant: int) -> int:
    """The int64 with the same bits."""
    return constant - (1 << 64) if constant >> 63 else constant


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Unsigned shift right of int64."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)
