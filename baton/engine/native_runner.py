"""The CPU's runner where the native operations fit: no tensors between a batch and its logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from baton.engine.batch import (
    Batch,
    BatchItem,
    BatchResult,
    Computed,
    Launched,
    LayerCallback,
    LayerGate,
    SampleRequest,
    last_tokens,
    resolve,
)
from baton.engine.runner import check_layout, group_ends, pool_tensor, warm_up_batches
from baton.engine.sampler import NOT_FINITE, sample, wants_best
from baton.errors import InternalError
from baton.kv.transport.base import PoolMemory
from baton.model.native_decoder import load_native
from baton.model.spec import ModelSpec
from baton.model.weights import load_weights
from baton.native import Logits, NativeBatch, Pool, Profile
from baton.types.fleet import KvLayout
from baton.types.request import SampledToken


class NativeRunner:
    """Runs one bfloat16 model on the CPU over one pool. See `TorchRunner`; for models of which
    `why_not_native` is None.

    The model has `threads` threads of its own, of which the one that calls `launch` is the first;
    thread i is pinned to `cpus[i]` if there are any. Torch is left with one thread, for sampling.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model_dir: Path,
        layout: KvLayout,
        memory: PoolMemory,
        num_blocks: int,
        layer_groups: int,
        threads: int,
        cpus: Sequence[int] = (),
    ) -> None:
        check_layout(spec, layout)
        self._ends = sorted(group_ends(spec.num_layers, layer_groups))
        kv = pool_tensor(layout, memory, num_blocks)
        self._pool = Pool(kv.data_ptr(), num_blocks, layout.block_size)
        self._kv: torch.Tensor | None = kv
        torch.set_num_threads(1)
        weights = load_weights(spec, model_dir, layout.dtype, "cpu")
        self._model = load_native(spec, weights, threads, cpus)
        self._last: dict[int, int] = {}  # sequence -> the token that the last step sampled

    def launch(
        self,
        batch: Batch,
        on_layers: LayerCallback | None = None,
        before_layers: LayerGate | None = None,
    ) -> Launched:
        """See `engine.batch.Runner`. Raises InternalError when the model gives no usable logits."""
        self._opened()
        batch = resolve(batch, self._last)
        logits = self._model.forward(
            native_batch(batch.items), self._pool, on_layers, self._ends, before_layers
        )
        if min(logits.best, default=0) < 0:
            raise InternalError(NOT_FINITE)
        requests = [item.sample for item in batch.items if item.sample is not None]
        sampled = iter(_choose(logits, requests))
        tokens = tuple(next(sampled) if item.sample else None for item in batch.items)
        self._last = last_tokens(batch.items, tokens)
        return Computed(BatchResult(tokens))

    def profile(self) -> Profile:
        """Where the time of the steps since the last call went."""
        return self._model.profile()

    def warm_up(self) -> None:
        """Run one prefill and one decode, so that the first request pays for no lazy set-up.

        To be called before the pool is used: writes to block 0, and leaves the pool zeroed.
        """
        kv = self._opened()
        for batch in warm_up_batches(self._pool.block_size):
            self.launch(batch, lambda _: None)
        kv[0].zero_()

    def close(self) -> None:
        """End the threads, drop the weights and the view of the pool. Idempotent."""
        self._model.close()
        self._kv = None

    def _opened(self) -> torch.Tensor:
        if self._kv is None:
            raise InternalError("the runner is closed")
        return self._kv


def _choose(logits: Logits, requests: Sequence[SampleRequest]) -> list[SampledToken]:
    """As `sample` does, without tensors where nobody asks for more than the best tokens: torch's
    code is long and cold at the end of a step, and costs more than all else here."""
    if all(map(wants_best, requests)):
        return [
            SampledToken(token, request.index)
            for token, request in zip(logits.best, requests, strict=True)
        ]
    return sample(torch.from_numpy(logits.values)[: len(requests)], requests, logits.best)


def native_batch(items: Sequence[BatchItem]) -> NativeBatch:
    """Flatten the items of a resolved batch."""
    return NativeBatch(
        tokens=[token for item in items for token in item.tokens],
        queries=[len(item.tokens) for item in items],
        starts=[item.start for item in items],
        blocks=[block for item in items for block in item.blocks],
        table_sizes=[len(item.blocks) for item in items],
        sampled=[item.sample is not None for item in items],
    )
