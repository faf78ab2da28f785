"""The torch runner: a frozen batch in, tokens out, KV written into pool memory on the way."""

from __future__ import annotations

from dataclasses import dataclass
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
from baton.engine.flat import flatten
from baton.engine.sampler import sample
from baton.errors import ConfigError, InternalError
from baton.kernels.dispatch import kernels_for
from baton.kv.transport.base import PoolMemory
from baton.model.decoder import Decoder, DecoderInput
from baton.model.packing import pack
from baton.model.spec import DTYPES, ModelSpec
from baton.model.weights import TORCH_DTYPES, load_weights
from baton.types.fleet import KvLayout
from baton.types.request import SamplingParams


@dataclass(frozen=True, slots=True)
class _Resources:
    """Everything that `close` gives back. `kv` is a view of the transport's pool memory."""

    decoder: Decoder
    kv: torch.Tensor


class TorchRunner:
    """Runs one model on one device over one pool. Weights are loaded by the constructor (seconds
    to minutes); weights, activations and KV are all in `layout.dtype`.

    `memory` must hold `num_blocks` blocks of `layout` and outlive the runner. `layer_groups` is
    into how many groups of layers a step's `on_layers` calls are divided. `threads` > 0 bounds
    the CPU threads of torch in this process; 0 leaves them as they are. `kernels` is a name for
    `kernels_for`.

    Raises ModelLoadError, and ConfigError when layout or memory do not fit the model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model_dir: Path,
        layout: KvLayout,
        memory: PoolMemory,
        num_blocks: int,
        device: str,
        layer_groups: int,
        threads: int = 0,
        kernels: str | None = None,
    ) -> None:
        check_layout(spec, layout)
        if threads > 0:
            torch.set_num_threads(threads)
        self._device = device
        self._block_size = layout.block_size
        self._group_ends = group_ends(spec.num_layers, layer_groups)
        weights = pack(load_weights(spec, model_dir, layout.dtype, device))
        self._last: dict[int, int] = {}  # sequence -> the token that the last step sampled
        self._resources: _Resources | None = _Resources(
            Decoder(spec, weights, kernels_for(device, kernels), device),
            pool_tensor(layout, memory, num_blocks),
        )

    def launch(
        self,
        batch: Batch,
        on_layers: LayerCallback | None = None,
        before_layers: LayerGate | None = None,
    ) -> Launched:
        """See `engine.batch.Runner`. Raises InternalError when the model gives no usable logits."""
        resources = self._opened()
        batch = resolve(batch, self._last)
        with torch.inference_mode():
            logits = resources.decoder.forward(
                build_input(batch, self._block_size, self._device),
                resources.kv,
                self._notifier(on_layers, before_layers),
            )
            requests = [item.sample for item in batch.items if item.sample is not None]
            sampled = iter(sample(logits, requests))
        tokens = tuple(next(sampled) if item.sample else None for item in batch.items)
        self._last = last_tokens(batch.items, tokens)
        return Computed(BatchResult(tokens))

    def warm_up(self) -> None:
        """Run one prefill and one decode, so that the first request pays for no lazy set-up.

        To be called before the pool is used: writes to block 0, and leaves the pool zeroed.
        """
        kv = self._opened().kv
        for batch in warm_up_batches(self._block_size):
            self.launch(batch, lambda _: None)
        kv[0].zero_()

    def close(self) -> None:
        """Drop the weights and the view of the pool. Idempotent."""
        self._resources = None

    def _opened(self) -> _Resources:
        if self._resources is None:
            raise InternalError("the runner is closed")
        return self._resources

    def _notifier(
        self, on_layers: LayerCallback | None, before_layers: LayerGate | None
    ) -> LayerCallback | None:
        """To be called between the writing and the reading of each layer's KV."""
        if on_layers is None and before_layers is None:
            return None
        on_cuda = self._device.startswith("cuda")

        def notify(layer_end: int) -> None:
            told = on_layers is not None and layer_end in self._group_ends
            if on_cuda and (told or before_layers is not None):
                torch.cuda.current_stream().synchronize()  # the KV was only queued so far
            if on_layers is not None and told:
                on_layers(layer_end)
            if before_layers is not None:
                before_layers(layer_end)

        return notify


def warm_up_batches(block_size: int) -> tuple[Batch, Batch]:
    """A prefill and a decode in block 0."""
    request = SampleRequest(SamplingParams(temperature=0.0), index=0, stop_ids=())
    chunk = (0,) * (block_size - 1)
    return (
        Batch(0, (BatchItem(0, chunk, 0, (0,), request),)),
        Batch(0, (BatchItem(0, (0,), len(chunk), (0,), request),)),
    )


def check_layout(spec: ModelSpec, layout: KvLayout) -> None:
    """Raises ConfigError when KV in this layout is not the model's, or nothing to compute in."""
    mine = (spec.fingerprint, spec.num_layers, spec.kv_heads, spec.head_dim)
    theirs = (layout.model, layout.num_layers, layout.kv_heads, layout.head_dim)
    if mine != theirs:
        raise ConfigError(
            f"the KV layout ({layout.describe()}) is not of this model ({spec.fingerprint[:12]}): "
            "make it with kv_layout(spec, dtype, block_size)"
        )
    if layout.quantization != "none" or layout.dtype not in DTYPES:
        raise ConfigError(
            f"the runner computes in {' or '.join(DTYPES)} without quantization; "
            f"the KV layout asks for {layout.describe()}"
        )


def pool_tensor(layout: KvLayout, memory: PoolMemory, num_blocks: int) -> torch.Tensor:
    """The pool `[num_blocks, num_layers, 2, kv_heads, block_size, head_dim]` over `memory`."""
    nbytes = num_blocks * layout.block_bytes
    if num_blocks < 1 or memory.nbytes < nbytes:
        raise ConfigError(
            f"a pool of {num_blocks} blocks takes {nbytes} bytes, the memory has {memory.nbytes}"
        )
    dtype = TORCH_DTYPES[layout.dtype]
    if isinstance(memory.buffer, torch.Tensor):
        flat = memory.buffer.view(torch.uint8)[:nbytes].view(dtype)
    else:
        flat = torch.frombuffer(memory.buffer, dtype=dtype, count=nbytes // dtype.itemsize)
    shape = (num_blocks, layout.num_layers, 2, layout.kv_heads, layout.block_size, layout.head_dim)
    return flat.view(shape)


def group_ends(num_layers: int, layer_groups: int) -> frozenset[int]:
    """Layer counts after which `on_layers` is called: every ceil(num_layers / layer_groups)."""
    if layer_groups < 1:
        raise ConfigError(f"layer_groups must be at least 1, not {layer_groups}")
    group = -(-num_layers // min(layer_groups, num_layers))
    return frozenset((*range(group, num_layers, group), num_layers))


def build_input(batch: Batch, block_size: int, device: str) -> DecoderInput:
    """A resolved batch on the device: leading one-token items are decodes, the rest chunks."""
    flat = flatten(batch, block_size)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in flat.arrays().items()}
    return DecoderInput(num_decodes=flat.num_decodes, **tensors)
