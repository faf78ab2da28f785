"""Which implementation of the kernels a device runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from baton.errors import ConfigError
from baton.kernels import reference, reference_rows

NAMES = ("reference", "triton", "flash")


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


class NormRopeWrite(Protocol):
    """See `baton.kernels.reference_rows.norm_rope_write`."""

    def __call__(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        eps: float,
        rotation: torch.Tensor,
        kv: torch.Tensor,
        layer: int,
        slots: torch.Tensor,
    ) -> torch.Tensor: ...


class Choose(Protocol):
    """See `baton.kernels.reference_rows.choose`."""

    def __call__(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        starts: torch.Tensor,
        tokens: torch.Tensor,
        finite: torch.Tensor,
    ) -> None: ...


KvWrite = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor], None]
BlockCopy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
RmsNorm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
AddRmsNorm = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]
]
SiluMul = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of everything between the matrix products: attention and KV in the pool,
    and what is done to rows. For one thread and, on CUDA, one stream at a time.
    """

    name: str
    attention_prefill: PrefillAttention
    attention_decode: DecodeAttention
    kv_write: KvWrite
    block_copy: BlockCopy
    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    norm_rope_write: NormRopeWrite
    silu_mul: SiluMul
    choose: Choose


def kernels_for(device: str, name: str | None = None) -> Kernels:
    """The kernels of a device ("cpu", "cuda", "cuda:1"): reference on the CPU, Triton on CUDA.

    `name` forces "reference", "triton", or "flash": Triton, with torch's FlashAttention for
    prefill. Raises ConfigError for an unknown name, and where Triton is wanted and is not installed
    or cannot run on the device.
    """
    chosen = name or ("triton" if device.startswith("cuda") else "reference")
    if chosen == "reference":
        return Kernels(
            name="reference",
            attention_prefill=reference.attention_prefill,
            attention_decode=reference.attention_decode,
            kv_write=reference.kv_write,
            block_copy=reference.block_copy,
            rms_norm=reference_rows.rms_norm,
            add_rms_norm=reference_rows.add_rms_norm,
            norm_rope_write=reference_rows.norm_rope_write,
            silu_mul=reference_rows.silu_mul,
            choose=reference_rows.choose,
        )
    if chosen == "triton":
        return _triton_kernels(device)
    if chosen == "flash":
        from baton.kernels import flash

        flash.require_flash(device)
        return replace(
            _triton_kernels(device), name="flash", attention_prefill=flash.attention_prefill
        )
    raise ConfigError(f"unknown kernels {chosen!r}; choose one of {', '.join(NAMES)}")


def _triton_kernels(device: str) -> Kernels:
    """Imported here and not above: importing Triton takes longer than the rest of a CPU worker."""
    from baton.kernels import attention_decode, attention_prefill, kv_copy, rows, sampling
    from baton.kernels.jit import require_triton

    require_triton(device)
    return Kernels(
        name="triton",
        attention_prefill=attention_prefill.attention_prefill,
        attention_decode=attention_decode.PagedDecode(),
        kv_write=kv_copy.kv_write,
        block_copy=kv_copy.block_copy,
        rms_norm=rows.rms_norm,
        add_rms_norm=rows.add_rms_norm,
        norm_rope_write=rows.norm_rope_write,
        silu_mul=rows.silu_mul,
        choose=sampling.choose,
    )
