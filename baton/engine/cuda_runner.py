"""The runner of devices with a queue: a step is queued as a whole, its tokens are fetched later.

Decode steps are replayed recordings (`baton.engine.graphs`); steps with prompt chunks are queued
operation by operation. A token that an item follows never leaves the device. What a step needs from
the host goes up in one copy from pinned memory, tokens come back in another, and `wait` is the only
place that waits; two kinds of items make `launch` wait too: those sampled by more than temperature
(in this step), and those whose penalties need the token that they follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from baton.engine.batch import (
    Batch,
    BatchItem,
    BatchResult,
    Launched,
    LayerCallback,
    LayerGate,
    SampleRequest,
    resolve,
)
from baton.engine.flat import flatten
from baton.engine.graph_backend import GraphBackend, Marker
from baton.engine.graphs import BUCKETS, MAX_SAMPLED, DecodeGraphs
from baton.engine.runner import check_layout, group_ends, pool_tensor, warm_up_batches
from baton.engine.sampler import is_plain, noise_of, sample
from baton.engine.staging import Downloads, Uploads
from baton.errors import InternalError
from baton.kernels.dispatch import Kernels
from baton.kv.transport.base import PoolMemory
from baton.model.decoder import Decoder, DecoderInput
from baton.model.spec import ModelSpec
from baton.model.weights import load_weights
from baton.types.fleet import KvLayout
from baton.types.request import SampledToken


@dataclass(frozen=True, slots=True)
class _Resources:
    """Everything that `close` gives back. `kv` is a view of the transport's pool memory."""

    decoder: Decoder
    kv: torch.Tensor
    graphs: DecodeGraphs


@dataclass(frozen=True, slots=True)
class _Step:
    """A `Launched`. Row i of `fetched` belongs to `items[rows[i]]`; rows that the device does not
    sample as they want are in `special`."""

    items: tuple[BatchItem, ...]
    rows: Sequence[int]
    special: Mapping[int, SampledToken]  # by row
    fetched: torch.Tensor  # [2, rows or more] int64: tokens, and whether their logits were finite
    done: Marker
    layers: Sequence[tuple[int, Marker]]
    on_layers: LayerCallback | None

    def wait(self) -> BatchResult:
        """See `engine.batch.Launched`. Raises InternalError when the model gave no usable
        logits."""
        if self.on_layers is not None:
            for layer_end, written in self.layers:
                written.wait()
                self.on_layers(layer_end)
        sampled = self.sampled()
        return BatchResult(tuple(sampled.get(index) for index in range(len(self.items))))

    def sampled(self) -> dict[int, SampledToken]:
        """The tokens, by number of the item. Waits for the step."""
        self.done.wait()
        tokens, finite = self.fetched.tolist()
        result = {}
        for row, index in enumerate(self.rows):
            request = self.items[index].sample
            if request is None:
                continue
            if row in self.special:
                result[index] = self.special[row]
            elif finite[row]:
                result[index] = SampledToken(tokens[row], request.index)
            else:
                raise InternalError("the model produced logits that are not finite (NaN or inf)")
        return result

    def sources(self) -> dict[int, int]:
        """In which row of what the device sampled each sequence's token is."""
        return {self.items[index].sequence: row for row, index in enumerate(self.rows)}

    def last_tokens(self) -> dict[int, int]:
        """Each sequence's token. Waits for the step."""
        return {
            self.items[index].sequence: token.token_id for index, token in self.sampled().items()
        }


class CudaRunner:
    """Runs one model on one device over one pool. Weights are loaded by the constructor (seconds
    to minutes); weights, activations and KV are all in `layout.dtype`.

    `memory` must hold `num_blocks` blocks of `layout` and outlive the runner. `layer_groups` is
    into how many groups of layers a step's `on_layers` calls are divided. Until `warm_up`, no step
    may be launched.

    On CUDA, all work is on the backend's own stream: who writes to the pool by other streams
    synchronizes them before a step may read it (transports do).

    Raises ModelLoadError, and ConfigError when layout or memory do not fit the model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model_dir: Path,
        layout: KvLayout,
        memory: PoolMemory,
        num_blocks: int,
        layer_groups: int,
        kernels: Kernels,
        backend: GraphBackend,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        check_layout(spec, layout)
        self._block_size = layout.block_size
        self._num_layers = spec.num_layers
        self._group_ends = group_ends(spec.num_layers, layer_groups)
        self._kernels = kernels
        self._backend = backend
        self._uploads = Uploads(backend)
        self._downloads = Downloads(backend, 2 * MAX_SAMPLED)
        self._previous: _Step | None = None
        kv = pool_tensor(layout, memory, num_blocks)
        device = str(backend.device)
        with backend.active():
            weights = load_weights(spec, model_dir, layout.dtype, device)
            decoder = Decoder(spec, weights, kernels, device)
            graphs = DecodeGraphs(
                decoder,
                kernels,
                kv,
                backend,
                self._uploads,
                spec.max_model_len,
                spec.vocab_size,
                buckets,
            )
        self._resources: _Resources | None = _Resources(decoder, kv, graphs)

    def warm_up(self) -> None:
        """Compile kernels and record decode steps, so that no request pays for it.

        To be called before the pool is used: writes to block 0, and leaves the pool zeroed.
        """
        resources = self._opened()
        with torch.inference_mode(), self._backend.active():
            resources.graphs.record()
        for batch in warm_up_batches(self._block_size):
            self.launch(batch).wait()
        with self._backend.active():
            resources.kv[0].zero_()
            self._backend.mark().wait()

    def launch(
        self,
        batch: Batch,
        on_layers: LayerCallback | None = None,
        before_layers: LayerGate | None = None,
    ) -> Launched:
        """See `engine.batch.Runner`."""
        resources = self._opened()
        previous, self._previous = self._previous, None
        if previous is not None and any(_needs_token(item) for item in batch.items):
            batch = resolve(batch, previous.last_tokens())
        sources = {} if previous is None else previous.sources()
        for item in batch.items:
            if item.follows and item.sequence not in sources:
                raise InternalError(
                    f"Sequence {item.sequence} follows a token that was not sampled."
                )
        with torch.inference_mode(), self._backend.active():
            if before_layers is not None:
                step = self._run_gated(resources, batch, sources, on_layers, before_layers)
            elif resources.graphs.fits(batch.items):
                step = self._replay(resources, batch.items, sources, on_layers)
            else:
                step = self._run(resources, batch, sources, on_layers)
        self._previous = step
        return step

    def close(self) -> None:
        """Drop the weights, the recordings and the view of the pool. Idempotent."""
        self._resources = None
        self._previous = None

    def _opened(self) -> _Resources:
        if self._resources is None:
            raise InternalError("the runner is closed")
        return self._resources

    def _replay(
        self,
        resources: _Resources,
        items: tuple[BatchItem, ...],
        sources: Mapping[int, int],
        on_layers: LayerCallback | None,
    ) -> _Step:
        logits = resources.graphs.run(items, sources)
        result = resources.graphs.result(len(items))
        special = self._sample_special(logits, [item.sample for item in items], result[0])
        fetched, done = self._downloads.fetch(result)
        layers = [(self._num_layers, done)]
        return _Step(items, range(len(items)), special, fetched, done, layers, on_layers)

    def _run_gated(
        self,
        resources: _Resources,
        batch: Batch,
        sources: Mapping[int, int],
        on_layers: LayerCallback | None,
        before_layers: LayerGate,
    ) -> _Step:
        """Layers are queued as their gate opens. When it does not, nothing stays queued."""
        try:
            return self._run(resources, batch, sources, on_layers, before_layers)
        except Exception:
            self._backend.mark().wait()
            raise

    def _run(
        self,
        resources: _Resources,
        batch: Batch,
        sources: Mapping[int, int],
        on_layers: LayerCallback | None,
        before_layers: LayerGate | None = None,
    ) -> _Step:
        """A step with prompt chunks, or of more rows than are recorded."""
        items, sampled = batch.items, resources.graphs.sampled
        rows = [index for index, item in enumerate(items) if item.sample is not None]
        if len(rows) > MAX_SAMPLED:
            raise InternalError(f"{len(rows)} rows are to be sampled; {MAX_SAMPLED} can be")
        flat = flatten(batch, self._block_size)
        arrays = flat.arrays()
        noise = [noise_of(items[index].sample) for index in rows]
        following = [index for index, item in enumerate(items) if item.follows]
        *sent, starts_of, temperatures_of, targets, origins = self._uploads.send(
            [
                *arrays.values(),
                np.array([start for start, _ in noise], dtype=np.int64),
                np.array([temperature for _, temperature in noise], dtype=np.float32),
                # Items that follow are one token long, and so are those before them.
                np.array(following, dtype=np.int64),
                np.array([sources[items[index].sequence] for index in following], dtype=np.int64),
            ]
        )
        given = dict(zip(arrays, sent, strict=True))
        if following:
            given["tokens"].index_copy_(0, targets, sampled[origins])
        layers: list[tuple[int, Marker]] = []

        def written(layer_end: int) -> None:
            if on_layers is not None and layer_end in self._group_ends:
                layers.append((layer_end, self._backend.mark()))
            if before_layers is not None:
                before_layers(layer_end)

        hidden = resources.decoder.last_hidden(
            DecoderInput(num_decodes=flat.num_decodes, **given),
            resources.kv,
            None if on_layers is None and before_layers is None else written,
        )
        logits = resources.decoder.logits(hidden)
        result = sampled[: 2 * len(rows)].view(2, len(rows))
        self._kernels.choose(logits, temperatures_of, starts_of, result[0], result[1])
        special = self._sample_special(logits, [items[index].sample for index in rows], result[0])
        fetched, done = self._downloads.fetch(result)
        return _Step(items, rows, special, fetched, done, layers, on_layers)

    def _sample_special(
        self,
        logits: torch.Tensor,
        requests: Sequence[SampleRequest | None],
        tokens: torch.Tensor,
    ) -> dict[int, SampledToken]:
        """Sample the rows that want more than temperature, and put their tokens in their place."""
        wanted = {
            row: request
            for row, request in enumerate(requests)
            if request is not None and not is_plain(request)
        }
        if not wanted:
            return {}
        rows = torch.tensor(list(wanted), device=logits.device)
        sampled = sample(logits[rows].float(), list(wanted.values()))
        ids = torch.tensor([token.token_id for token in sampled], device=logits.device)
        tokens.index_copy_(0, rows, ids)
        return dict(zip(wanted, sampled, strict=True))


def _needs_token(item: BatchItem) -> bool:
    return item.follows and item.sample is not None and item.sample.penalized
