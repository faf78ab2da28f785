"""What `baton bench engine` is asked to measure. No torch: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("prefill", "decode", "mixed", "loop", "kernels", "profile")


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. Neither `model` nor `shape`: the built-in demo model."""

    model: str | None = None  # a directory or a hub id
    shape: str | None = None  # random weights; see engine_models.SHAPES
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0  # 0 = one per CPU
    kernels: str = "auto"  # as in a worker's configuration
    block_size: int = 32
    step_tokens: int = 2048
    prompts: tuple[int, ...] = ()  # tokens of the prompts to measure; none: what suits the device
    decodes: tuple[tuple[int, int], ...] = ()  # sequences and tokens of each; none: the same
    quick: bool = False  # small sizes and short measurements: whether everything runs
    parts: tuple[str, ...] = PARTS[:-1]
