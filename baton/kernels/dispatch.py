"""Which implementation of the kernels a device runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.errors import ConfigError
from baton.kernels import reference

NAMES = ("reference", "triton")


class PrefillAttention(Protocol):
    """See `baton.kernels.reference.attention_prefill`."""

    def __call__(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: int,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor: ...


class DecodeAttention(Protocol):
    """See `baton.kernels.reference.attention_decode`."""

    def __call__(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: int,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor: ...


KvWrite = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor], None]
BlockCopy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of everything that touches the pool."""

    name: str
    attention_prefill: PrefillAttention
    attention_decode: DecodeAttention
    kv_write: KvWrite
    block_copy: BlockCopy


def kernels_for(device: str, name: str | None = None) -> Kernels:
    """The kernels of a device ("cpu", "cuda", "cuda:1"): reference on the CPU, Triton on CUDA.

    `name` forces "reference" or "triton". Raises ConfigError for an unknown name, and where Triton
    is wanted and is not installed or cannot run on the device.
    """
    chosen = name or ("triton" if device.startswith("cuda") else "reference")
    if chosen == "reference":
        return Kernels(
            name="reference",
            attention_prefill=reference.attention_prefill,
            attention_decode=reference.attention_decode,
            kv_write=reference.kv_write,
            block_copy=reference.block_copy,
        )
    if chosen == "triton":
        return _triton_kernels(device)
    raise ConfigError(f"unknown kernels {chosen!r}; choose one of {', '.join(NAMES)}")


def _triton_kernels(device: str) -> Kernels:
    """Imported here and not above: importing Triton takes longer than the rest of a CPU worker."""
    from baton.kernels import attention_decode, attention_prefill, kv_copy
    from baton.kernels.jit import require_triton

    require_triton(device)
    return Kernels(
        name="triton",
        attention_prefill=attention_prefill.attention_prefill,
        attention_decode=attention_decode.attention_decode,
        kv_write=kv_copy.kv_write,
        block_copy=kv_copy.block_copy,
    )
