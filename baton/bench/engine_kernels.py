"""Every operation of a step by itself, through the same table of kernels that the decoder uses.

Operands rotate through the model's layers, so that nothing is faster than in a step because the
call before left it in a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from baton.bench.engine_cost import Chunk, Matrix, Work
from baton.bench.engine_device import Device
from baton.bench.engine_phases import Figure, Measured, OnFigure, Skipped
from baton.bench.engine_profile import operation_seconds
from baton.bench.engine_rig import GREEDY, Model, Rig, fill
from baton.bench.engine_time import measure, summarize
from baton.engine.batch import SampleRequest
from baton.engine.native_runner import NativeRunner
from baton.engine.sampler import sample
from baton.kernels.dispatch import Kernels, kernels_for
from baton.kv.transport.memory import make_pool
from baton.model.layers import DecoderWeights, linear
from baton.model.packing import pack
from baton.model.rope import rope_table
from baton.model.weights import TORCH_DTYPES, load_weights
from baton.types.request import SamplingParams

_DRAWN = SampleRequest(SamplingParams(temperature=1.0, seed=1), index=0, stop_ids=())


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """Which sizes; as in `engine_phases.Plan`."""

    decodes: tuple[tuple[int, int], ...]  # (sequences, tokens of each)
    chunks: tuple[tuple[int, int], ...]  # (tokens before, tokens)
    rows: tuple[int, ...]  # of everything that is done row by row
    budget_s: float
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    rows: int
    work: Work
    call: Callable[[], object]


def measure_kernels(
    model: Model, device: Device, plan: KernelPlan, name: str, on_figure: OnFigure
) -> tuple[Figure, ...]:
    """By the kernels `name` of the dispatch table, "auto" being the device's own.

    Raises ModelLoadError; needs memory for the weights and for the largest pool.
    """
    bench = _Bench(model, device, kernels_for(device.name, None if name == "auto" else name))
    figures: list[Figure] = []
    with torch.inference_mode():
        for case in bench.cases(plan):
            on_figure(case.name)
            if isinstance(case, Skipped):
                figures.append(case)
                continue
            timing = device.time(case.call, plan.budget_s)
            figures.append(Measured(case.name, case.rows, timing, case.work))
    return tuple(figures)


def measure_native(rig: Rig, plan: KernelPlan, on_figure: OnFigure) -> tuple[Figure, ...]:
    """Operations inside of whole steps, by the native counters of the first thread; what it waits
    for others is left out. Nothing for another runner."""
    if not isinstance(rig.runner, NativeRunner):
        return ()
    figures: list[Figure] = []
    steps = [
        (f"{batch} x {context}", [Chunk(context - 1, 1)] * batch) for batch, context in plan.decodes
    ]
    steps += [
        (f"{tokens} after {before}", [Chunk(before, tokens)]) for before, tokens in plan.chunks
    ]
    for name, step in steps:
        on_figure(f"operations of {name}")
        longest = max(chunk.start + chunk.tokens for chunk in step)
        if longest > rig.model.spec.max_model_len or rig.blocks(step) > rig.num_blocks:
            figures.append(Skipped(name, "the model or the pool is too small"))
            continue
        figures += _operations(rig, rig.runner, name, step, plan.budget_s)
    return tuple(figures)


def _operations(
    rig: Rig, runner: NativeRunner, name: str, step: Sequence[Chunk], budget_s: float
) -> Iterator[Measured]:
    batch = [rig.batch(step)]
    samples: dict[str, list[float]] = {}

    def once() -> None:
        for operation, seconds in operation_seconds(runner, batch).items():
            samples.setdefault(operation, []).append(seconds)

    measure(once, budget_s)
    rows = sum(chunk.tokens for chunk in step)
    for operation, work in rig.model.cost.operations(step).items():
        if work.flops:
            yield Measured(f"{operation} in {name}", rows, summarize(samples[operation]), work)


@dataclass(frozen=True, slots=True)
class _Bench:
    model: Model
    device: Device
    kernels: Kernels

    def cases(self, plan: KernelPlan) -> Iterator[_Case | Skipped]:
        yield from self._attention(plan)
        yield from self._row_by_row(plan)
        weights = load_weights(
            self.model.spec, self.model.directory, self.model.layout.dtype, self.device.name
        )
        yield from self._products(pack(weights), plan)

    # -- attention --------------------------------------------------------------------------

    def _attention(self, plan: KernelPlan) -> Iterator[_Case | Skipped]:
        for batch, context in plan.decodes:
            name = f"attention decode {batch} x {context}"
            yield self._in_pool(name, [Chunk(context - 1, 1)] * batch, plan, self._decode)
        for before, tokens in plan.chunks:
            name = f"attention prefill {tokens} after {before}"
            yield self._in_pool(name, [Chunk(before, tokens)], plan, self._prefill)

    def _in_pool(
        self,
        name: str,
        chunks: Sequence[Chunk],
        plan: KernelPlan,
        make: Callable[[Sequence[Chunk], torch.Tensor], Callable[[], object]],
    ) -> _Case | Skipped:
        blocks = sum(map(self._blocks, chunks))
        if blocks * self.model.layout.block_bytes > plan.kv_bytes:
            return Skipped(name, "its KV is more than there is room for")
        rows = sum(chunk.tokens for chunk in chunks)
        work = self.model.cost.attention(chunks, layer=0)
        return _Case(name, rows, work, make(chunks, self._pool(blocks)))

    def _decode(self, chunks: Sequence[Chunk], kv: torch.Tensor) -> Callable[[], object]:
        q = self._values(len(chunks), self.model.spec.heads, self.model.spec.head_dim)
        tables = self._tables(chunks)
        lengths = self._int32([chunk.start + 1 for chunk in chunks])
        layers = count()
        scale = self.model.spec.head_dim**-0.5
        return lambda: self.kernels.attention_decode(
            q, kv, next(layers) % kv.shape[1], tables, lengths, scale
        )

    def _prefill(self, chunks: Sequence[Chunk], kv: torch.Tensor) -> Callable[[], object]:
        ends = [sum(chunk.tokens for chunk in chunks[:row]) for row in range(len(chunks) + 1)]
        q = self._values(ends[-1], self.model.spec.heads, self.model.spec.head_dim)
        tables, starts = self._tables(chunks), self._int32(ends)
        contexts = self._int32([chunk.start for chunk in chunks])
        layers = count()
        scale = self.model.spec.head_dim**-0.5
        return lambda: self.kernels.attention_prefill(
            q, kv, next(layers) % kv.shape[1], tables, starts, contexts, scale
        )

    def _blocks(self, chunk: Chunk) -> int:
        return self.model.layout.blocks_for(chunk.start + chunk.tokens)

    def _pool(self, blocks: int) -> torch.Tensor:
        spec, layout = self.model.spec, self.model.layout
        memory = make_pool(blocks * layout.block_bytes, self.device.name)
        dtype = TORCH_DTYPES[layout.dtype]
        fill(memory, dtype)
        raw = memory.buffer
        flat = raw if isinstance(raw, torch.Tensor) else torch.frombuffer(raw, dtype=torch.uint8)
        shape = (spec.num_layers, 2, spec.kv_heads, layout.block_size, spec.head_dim)
        return flat.view(dtype).view(blocks, *shape)

    def _tables(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Of equally long sequences, in scattered blocks."""
        each = self._blocks(chunks[0])
        order = torch.randperm(each * len(chunks), generator=torch.Generator().manual_seed(0))
        return order.view(len(chunks), each).to(torch.int32).to(self.device.name)

    # -- rows -------------------------------------------------------------------------------

    def _row_by_row(self, plan: KernelPlan) -> Iterator[_Case]:
        spec = self.model.spec
        norm = self._values(spec.hidden_size)
        kv = self._pool(self.model.layout.blocks_for(max(plan.rows)))
        rope = rope_table(spec.rope, spec.head_dim, max(plan.rows), self.device.name)
        for rows in plan.rows:
            yield self._norm(rows, norm)
            yield self._silu(rows)
            yield self._rope(rows, kv, rope)
        for rows in (1, min(64, max(plan.rows))):
            for request in (GREEDY, _DRAWN):
                yield self._sampling(rows, request)

    def _sampling(self, rows: int, request: SampleRequest) -> _Case:
        """As the device's runner does it: on CUDA by a kernel, that leaves the tokens there."""
        vocab, temperature = self.model.spec.vocab_size, request.params.temperature
        logits = torch.randn(rows, vocab, device=self.device.name)
        if not self.device.is_cuda:
            return _Case(
                f"sampling at temperature {temperature:g} {rows} rows",
                rows,
                Work(read=logits.nbytes),
                lambda: sample(logits, [request] * rows),
            )
        logits = logits.to(TORCH_DTYPES[self.model.layout.dtype])
        temperatures = torch.full((rows,), temperature, device=self.device.name)
        starts = torch.arange(rows, device=self.device.name)
        tokens, finite = torch.empty(2, rows, dtype=torch.int64, device=self.device.name)
        return _Case(
            f"sampling at temperature {temperature:g} {rows} rows",
            rows,
            Work(read=logits.nbytes),
            lambda: self.kernels.choose(logits, temperatures, starts, tokens, finite),
        )

    def _norm(self, rows: int, weight: torch.Tensor) -> _Case:
        spec, width = self.model.spec, self.model.cost.width
        hidden, delta = self._values(rows, spec.hidden_size), self._values(rows, spec.hidden_size)
        size = rows * spec.hidden_size * width
        return _Case(
            f"residual and norm {rows} rows",
            rows,
            Work(read=2 * size, written=2 * size),
            lambda: self.kernels.add_rms_norm(hidden, delta, weight, spec.rms_norm_eps),
        )

    def _silu(self, rows: int) -> _Case:
        size = rows * self.model.spec.intermediate_size * self.model.cost.width
        gate_up = self._values(rows, 2 * self.model.spec.intermediate_size)
        work = Work(read=2 * size, written=size)
        return _Case(f"silu {rows} rows", rows, work, lambda: self.kernels.silu_mul(gate_up))

    def _rope(self, rows: int, kv: torch.Tensor, rope: torch.Tensor) -> _Case:
        """Query and key norm, rotation, KV written."""
        spec, width = self.model.spec, self.model.cost.width
        heads = spec.heads + 2 * spec.kv_heads
        qkv = self._values(rows, heads, spec.head_dim)
        qk_norm = None
        if spec.qk_norm:
            qk_norm = self._values(spec.heads + spec.kv_heads, spec.head_dim)
        slots = torch.arange(rows, device=self.device.name)
        rotation = rope[:, :rows, None].contiguous()
        size = rows * heads * spec.head_dim * width
        layers = count()
        return _Case(
            f"rotation and KV write {rows} rows",
            rows,
            Work(read=size + rotation[:, :rows].nbytes, written=size),
            lambda: self.kernels.norm_rope_write(
                qkv, qk_norm, spec.rms_norm_eps, rotation, kv, next(layers) % kv.shape[1], slots
            ),
        )

    # -- products ---------------------------------------------------------------------------

    def _products(self, weights: DecoderWeights, plan: KernelPlan) -> Iterator[_Case]:
        cost = self.model.cost
        by_layer = {
            matrix.name: [getattr(layer, matrix.name) for layer in weights.layers]
            for matrix in (cost.qkv, *cost.mixing)
        }
        for rows in plan.rows:
            for matrix in (cost.qkv, *cost.mixing):
                yield self._product(matrix, by_layer[matrix.name], rows)
        for rows in (1, min(64, max(plan.rows))):
            yield self._product(cost.head, [weights.lm_head], rows)

    def _product(self, matrix: Matrix, weights: Sequence[torch.Tensor], rows: int) -> _Case:
        left = self._values(rows, matrix.depth)
        layers = count()
        return _Case(
            f"product {matrix.name} {rows} rows",
            rows,
            matrix.product(rows, self.model.cost.width),
            lambda: linear(left, weights[next(layers) % len(weights)]),
        )

    # -- operands ---------------------------------------------------------------------------

    def _values(self, *shape: int) -> torch.Tensor:
        dtype = TORCH_DTYPES[self.model.layout.dtype]
        return torch.randn(shape, device=self.device.name).to(dtype)

    def _int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device.name)
