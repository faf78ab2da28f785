"""How much KV fits into the memory of a node."""

from __future__ import annotations

from baton.errors import ConfigError
from sim.costs.machines import Node
from sim.costs.models import ModelSpec

RESERVE = 0.1
"""Of a GPU's memory, for activations, graphs and communication: what vLLM leaves free by default
(`gpu_memory_utilization` 0.9)."""


def kv_capacity_blocks(
    spec: ModelSpec, node: Node, tensor_parallel: int, block_tokens: int, reserve: float = RESERVE
) -> int:
    """Blocks of `block_tokens` that fit behind the weights on `tensor_parallel` GPUs.

    Raises ConfigError when not even one fits.
    """
    memory = tensor_parallel * node.gpu.hbm_bytes * (1 - reserve)
    copies = max(1.0, tensor_parallel / spec.kv_heads)  # of KV heads that GPUs share
    blocks = int((memory - spec.weight_bytes) // (block_tokens * spec.kv_bytes_per_token * copies))
    if blocks < 1:
        raise ConfigError(
            f"{spec.name} needs {spec.weight_bytes / 1e9:.0f} GB for its weights, and {node.name} "
            f"has {memory / 1e9:.0f} GB on {tensor_parallel} GPUs"
        )
    return blocks
