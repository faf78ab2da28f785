"""Prefill attention over the paged pool, next to torch's SDPA over K and V that lie side by side.

SDPA has it easier: no block table, and K and V of a head in one piece. What is compared is a chunk
of a prompt behind the tokens before it, one sequence, one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from baton.bench.engine_cost import visible_pairs
from baton.bench.engine_device import Device, find_device
from baton.bench.engine_models import Shape, shape_named
from baton.bench.engine_text import Table, rate_text, share_text, time_text
from baton.kernels.dispatch import kernels_for

_BLOCK = 32
_BUDGET_S = 0.3
_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True, slots=True)
class _Case:
    """`tokens` queries behind `before` tokens."""

    before: int
    tokens: int
    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.tokens} after {self.before}"

    @property
    def flops(self) -> int:
        pairs = visible_pairs(self.before, self.tokens, window=0)
        return 4 * self.shape.heads * self.shape.head_dim * pairs


def compare(device_name: str, shape_name: str, quick: bool) -> Table:
    """Every implementation that runs here, by chunk."""
    device, shape = find_device(device_name, 0), shape_named(shape_name)
    chunks = ((0, 64), (64, 64)) if quick else ((0, 4096), (0, 16_384), (12_288, 4096))
    rows: list[tuple[str, ...]] = []
    for before, tokens in chunks:
        rows += _rows(device, _Case(before, tokens, shape))
    header = ("chunk", "implementation", "time", "FLOP/s", "of the best SDPA")
    return Table("Prefill attention", header, tuple(rows))


def _rows(device: Device, case: _Case) -> Iterator[tuple[str, ...]]:
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device.name)

    length, head_dim = case.before + case.tokens, case.shape.head_dim
    blocks = -(-length // _BLOCK)
    q = values(case.tokens, case.shape.heads, head_dim)
    kv = values(blocks, 1, 2, case.shape.kv_heads, _BLOCK, head_dim)
    calls = {**dict(_sdpa(q, kv, length)), **dict(_paged(device, q, kv, case))}
    times: dict[str, float] = {}
    for name, call in calls.items():
        try:
            with torch.inference_mode():
                call()
                times[name] = device.time(call, _BUDGET_S).median_s
        except Exception as error:  # whatever a back end raises that cannot do this here
            reason = (str(error) or type(error).__name__).splitlines()[0]
            yield case.name, name, f"not here: {reason[:80]}", "", ""
    best = min((time for name, time in times.items() if name.startswith("SDPA")), default=None)
    for name, time in times.items():
        share = "" if best is None else share_text(best / time)
        yield case.name, name, time_text(time), rate_text(case.flops / time, "FLOP/s"), share


def _sdpa(
    q: torch.Tensor, kv: torch.Tensor, length: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    # [blocks, 2, kv_heads, block, dim] -> [2, 1, kv_heads, tokens, dim]
    both = kv[:, 0].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, :length].contiguous()
    queries = q.transpose(0, 1)[None].contiguous()
    mask = None if len(q) == length else causal_lower_right(len(q), length)

    for name, backend in _BACKENDS.items():

        def call(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    queries, both[0], both[1], mask, is_causal=mask is None, enable_gqa=True
                )

        yield name, call


def _paged(
    device: Device, q: torch.Tensor, kv: torch.Tensor, case: _Case
) -> Iterator[tuple[str, Callable[[], object]]]:
    table = torch.arange(len(kv), dtype=torch.int32, device=device.name)[None]
    starts = torch.tensor([0, case.tokens], dtype=torch.int32, device=device.name)
    context = torch.tensor([case.before], dtype=torch.int32, device=device.name)
    scale = case.shape.head_dim**-0.5
    for name in ("triton", "flash") if device.is_cuda else ("reference",):

        def call(name: str = name) -> torch.Tensor:
            kernels = kernels_for(device.name, name)
            return kernels.attention_prefill(q, kv, 0, table, starts, context, scale)

        yield f"baton {name}", call
