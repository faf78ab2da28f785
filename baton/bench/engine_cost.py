"""What a step has to compute and to move, at least: floating-point operations and bytes. No torch.

Counted is what the answer needs, whatever an implementation does on top:

    products    every matrix of every layer for every token; in the last layer, behind the KV, and
                in the output head only for the rows that are sampled
    attention   QK^T and PV for the keys that each query sees (causal, sliding windows)
    weights     once per step; no embedding look-up, but the output head where a row is sampled
    KV          of the tokens before the chunk, read once; of its own tokens, written once

Activations are not counted: they fit into caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.model.spec import ModelSpec

_WIDTHS = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Work:
    """A multiplication and an addition are two `flops`; the others are bytes of memory traffic."""

    flops: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.read + other.read, self.written + other.written)

    def times(self, count: int) -> Work:
        return Work(self.flops * count, self.read * count, self.written * count)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + tokens) of one sequence in one step."""

    start: int
    tokens: int
    sampled: bool = True


def prompt_chunks(prompt: int, most: int) -> tuple[Chunk, ...]:
    """A prompt as the engine's steps see it when it is alone; `most` tokens fit into a step."""
    starts = range(0, prompt, most)
    return tuple(
        Chunk(start, min(most, prompt - start), sampled=start + most >= prompt) for start in starts
    )


def visible_pairs(start: int, tokens: int, window: int) -> int:
    """(query, key) pairs that causal attention of positions [start, start + tokens) looks at."""

    def before(end: int) -> int:
        full = end if window == 0 else min(end, window)
        return full * (full + 1) // 2 + (end - full) * window

    return before(start + tokens) - before(start)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight of one layer or the output head, `[out, depth]`."""

    name: str
    out: int
    depth: int

    def product(self, rows: int, width: int) -> Work:
        """`rows` times the matrix: operands read and the result written once. `width` is bytes
        per value."""
        values = self.out * self.depth + rows * self.depth
        return Work(2 * rows * self.out * self.depth, values * width, rows * self.out * width)

    @property
    def flops(self) -> int:
        """For one row."""
        return 2 * self.out * self.depth


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Counts for one model in one dtype ("float32" | "bfloat16")."""

    spec: ModelSpec
    dtype: str

    @property
    def width(self) -> int:
        """Bytes per value."""
        return _WIDTHS[self.dtype]

    @property
    def qkv(self) -> Matrix:
        heads = self.spec.heads + 2 * self.spec.kv_heads
        return Matrix("qkv", heads * self.spec.head_dim, self.spec.hidden_size)

    @property
    def mixing(self) -> tuple[Matrix, ...]:
        """What stands behind a layer's attention."""
        hidden, mlp = self.spec.hidden_size, self.spec.intermediate_size
        return (
            Matrix("output", hidden, self.spec.heads * self.spec.head_dim),
            Matrix("gate_up", 2 * mlp, hidden),
            Matrix("down", hidden, mlp),
        )

    @property
    def head(self) -> Matrix:
        return Matrix("lm_head", self.spec.vocab_size, self.spec.hidden_size)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return (self.qkv, *self.mixing, self.head)

    @property
    def kv_token_bytes(self) -> int:
        """K and V of one token, all layers."""
        return self.spec.num_layers * self._kv_layer_bytes

    def weight_bytes(self, sampled: bool = True) -> int:
        """What a step reads of the weights."""
        spec = self.spec
        values = spec.num_layers * self._kv_values + (spec.num_layers - 1) * self._mixing_values
        if sampled:
            values += self._mixing_values + spec.hidden_size + spec.vocab_size * spec.hidden_size
        return values * self.width

    def step(self, chunks: Sequence[Chunk]) -> Work:
        """One forward pass."""
        rows = sum(chunk.tokens for chunk in chunks)
        sampled = sum(chunk.sampled for chunk in chunks)
        mixing = sum(matrix.flops for matrix in self.mixing)
        layers = self.spec.num_layers
        products = rows * (layers * self.qkv.flops + (layers - 1) * mixing)
        products += sampled * (mixing + self.head.flops)
        attention = sum((self._attention(chunk) for chunk in chunks), Work())
        return attention + Work(
            flops=products,
            read=self.weight_bytes(sampled > 0),
            written=rows * self.kv_token_bytes,
        )

    def operations(self, chunks: Sequence[Chunk]) -> dict[str, Work]:
        """`step` by operation, under the names of the native profile. Without operations that only
        touch rows: what they read and write is in caches."""
        rows = sum(chunk.tokens for chunk in chunks)
        sampled = sum(chunk.sampled for chunk in chunks)
        layers, last = self.spec.num_layers, 1 if sampled else 0
        times = (rows * (layers - 1) + sampled, layers - 1 + last)
        output, up, down = (self._multiplied(matrix, *times) for matrix in self.mixing)
        return {
            "qkv": self._multiplied(self.qkv, rows * layers, layers),
            "attention": sum((self._attention(chunk) for chunk in chunks), Work()),
            "output": output,
            "MLP up": up,
            "MLP down": down,
            "logits": self._multiplied(self.head, sampled, last),
        }

    def _multiplied(self, matrix: Matrix, rows: int, times: int) -> Work:
        """`rows` products with one of `times` matrices each, every one of which is read once."""
        return Work(rows * matrix.flops, times * matrix.out * matrix.depth * self.width)

    def attention(self, chunks: Sequence[Chunk], layer: int) -> Work:
        """Attention of one layer by itself: all rows, K and V of every visible token are read."""
        window = self.spec.windows[layer]
        vectors = sum(chunk.tokens for chunk in chunks) * self.spec.heads * self.spec.head_dim
        keys = sum(_keys(chunk.start + chunk.tokens, chunk.tokens, window) for chunk in chunks)
        return Work(
            flops=sum(self._pair_flops(c.start, c.tokens, window) for c in chunks),
            read=vectors * self.width + keys * self._kv_layer_bytes,
            written=vectors * self.width,
        )

    def _attention(self, chunk: Chunk) -> Work:
        """Of all layers; the last one counts only where its row is sampled."""
        work, last = Work(), self.spec.num_layers - 1
        for layer, window in enumerate(self.spec.windows):
            if layer < last:
                flops = self._pair_flops(chunk.start, chunk.tokens, window)
            elif chunk.sampled:
                flops = self._pair_flops(chunk.start + chunk.tokens - 1, 1, window)
            else:
                continue
            before = _keys(chunk.start + chunk.tokens, chunk.tokens, window) - chunk.tokens
            work += Work(flops, before * self._kv_layer_bytes)
        return work

    def _pair_flops(self, start: int, tokens: int, window: int) -> int:
        heads = self.spec.heads * self.spec.head_dim
        return 4 * heads * visible_pairs(start, tokens, window)

    @property
    def _kv_layer_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.spec.kv_heads * self.spec.head_dim * self.width

    @property
    def _kv_values(self) -> int:
        """Weights of one layer up to its KV."""
        spec, qkv = self.spec, self.qkv
        values = spec.hidden_size + qkv.out * qkv.depth
        if spec.qkv_bias:
            values += qkv.out
        if spec.qk_norm:
            values += 2 * spec.head_dim
        return values

    @property
    def _mixing_values(self) -> int:
        """Weights of one layer behind its attention."""
        spec = self.spec
        values = spec.hidden_size + sum(m.out * m.depth for m in self.mixing)
        if spec.output_bias:
            values += spec.hidden_size
        if spec.mlp_bias:
            values += 2 * spec.intermediate_size + spec.hidden_size
        return values


def _keys(end: int, tokens: int, window: int) -> int:
    """Tokens that any of the queries at [end - tokens, end) sees."""
    return end if window == 0 else min(end, tokens + window - 1)
