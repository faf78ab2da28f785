"""What a step of an engine takes, from the shapes of the model and the rates of the machine.

    step = overhead + all-reduces + products + attention of prompts + attention of decodes
           each of the last three: max(operations / achieved rate, bytes / achieved bandwidth)

Products are shared by all tokens of a step, so their weights are read once, and a small chunk
takes as long as reading them. Attention of prompts and of decodes are kernels of their own. A step
with decodes alone is so max(compute, (weights + KV) / bandwidth) in the usual case, where both of
its parts are bound by memory; a step with both is neither the sum nor the longer of two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sim.costs.machines import Node
from sim.costs.models import ModelSpec


@dataclass(frozen=True, slots=True)
class Prefill:
    """`new` tokens of a prompt that are computed in a step, behind `context` that have KV."""

    new: int
    context: int = 0


class StepCost(Protocol):
    """Seconds of one step: an iteration of continuous batching."""

    def seconds(self, prefill: Sequence[Prefill], decode: Sequence[int]) -> float:
        """`decode` has the context of each sequence that gets one token; 0 for an empty step."""


def paper_flops(spec: ModelSpec, new: int, context: int = 0) -> float:
    """Of a prefill, as Mooncake counts them (FAST'25, equation 1): l (4 n² d + 22 n d²), less that
    of the cached prefix."""

    def whole(tokens: int) -> float:
        return 4.0 * tokens**2 * spec.hidden + 22.0 * tokens * spec.hidden**2

    return spec.num_layers * (whole(context + new) - whole(context))


def product_flops(spec: ModelSpec, tokens: int, sampled: int) -> float:
    """Of `tokens` through all layers, and of `sampled` ones through the output head."""
    return 2.0 * (tokens * spec.num_layers * spec.layer_params + sampled * spec.head_params)


def attention_flops(spec: ModelSpec, new: int, context: int = 0) -> float:
    """QK^T and PV of each new token with every token up to itself."""
    pairs = new * context + new * (new + 1) / 2
    return 4.0 * spec.num_layers * spec.num_heads * spec.head_dim * pairs


def prefill_flops(spec: ModelSpec, new: int, context: int = 0) -> float:
    """Exactly what a prefill needs; the counterpart of `paper_flops`, and what `Roofline` uses.

    They differ in two places. Per token and layer, products of LLaMA-70B are 25.5 d² and not 22 d²
    (query and output 4, key and value 0.5 with eight KV heads of 64, SwiGLU with ffn = 3.5 d 21).
    Attention is causal, so half of the paper's 4 n² d. The exact count is higher below n = 1.75 d =
    14,000 tokens (by 6 % at 8,192) and lower above (by a third at 131,072).
    """
    return product_flops(spec, new, 1) + attention_flops(spec, new, context)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Implements `StepCost` for `tensor_parallel` GPUs of a node."""

    spec: ModelSpec
    node: Node
    tensor_parallel: int
    allreduce_s: float = 15e-6  # latency of one all-reduce

    def seconds(self, prefill: Sequence[Prefill], decode: Sequence[int]) -> float:
        tokens = sum(part.new for part in prefill) + len(decode)
        if not tokens:
            return 0.0
        return (
            self.node.step_overhead_s
            + self._allreduces(tokens)
            + self._products(tokens, len(prefill) + len(decode))
            + sum(map(self._prompt_attention, prefill))
            + self._kv_s(sum(decode))
        )

    def _products(self, tokens: int, sampled: int) -> float:
        gpu = self.node.gpu
        compute = product_flops(self.spec, tokens, sampled) / gpu.prefill_efficiency / gpu.flops
        return max(compute, self._weights_s) / self.tensor_parallel

    def _prompt_attention(self, part: Prefill) -> float:
        gpu, spec = self.node.gpu, self.spec
        flops = attention_flops(spec, part.new, part.context)
        compute = flops / gpu.attention_efficiency / gpu.flops
        return max(compute / self.tensor_parallel, self._kv_s(part.context + part.new))

    def _kv_s(self, tokens: int) -> float:
        """Reading the KV of so many. More GPUs than KV heads hold copies, and read the same."""
        gpu, shards = self.node.gpu, min(self.tensor_parallel, self.spec.kv_heads)
        nbytes = tokens * self.spec.kv_bytes_per_token / shards
        return nbytes / gpu.hbm_bytes_per_s / gpu.kv_efficiency

    @property
    def _weights_s(self) -> float:
        """Reading them, by one GPU alone."""
        gpu = self.node.gpu
        return self.spec.step_weight_bytes / gpu.hbm_bytes_per_s / gpu.decode_efficiency

    def _allreduces(self, tokens: int) -> float:
        """Two per layer, behind attention and MLP (Megatron-LM, section 3), as a ring: each GPU
        sends 2 (tp - 1) / tp of the bytes."""
        gpu, spec, gpus = self.node.gpu, self.spec, self.tensor_parallel
        if gpus == 1:
            return 0.0
        sent = 2 * (gpus - 1) / gpus * tokens * spec.hidden * 2
        moving = sent / gpu.nvlink_bytes_per_s / gpu.nvlink_efficiency
        return 2 * spec.num_layers * (moving + self.allreduce_s)
