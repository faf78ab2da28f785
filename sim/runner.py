"""A runner without a model: KV are bytes in the pool, and a token is a hash of all that it reads.

    KV of position p, in each layer:  (token p, chain p ^ layer)     chain p = f(chain p-1, token p)
    next token                     :  hash of the KV of the whole context, in all layers, as read
                                      back through the block table

As with a real model, the KV of a position depends on everything before it, and every byte of it
counts: a block that is missing, stale, half copied or of another prefix gives another token.
`expected_answer` says what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from baton.engine.batch import (
    Batch,
    BatchItem,
    BatchResult,
    Launched,
    LayerCallback,
    LayerGate,
    SampleRequest,
    last_tokens,
    resolve,
)
from baton.errors import InternalError
from baton.kv.transport.base import PoolMemory
from baton.types.fleet import KvLayout
from baton.types.request import SampledToken, SamplingParams

VOCAB = 997
_HEAD_DIM = 2  # one int32 for the token, one for the chain

Cells = npt.NDArray[np.int32]


def modelled_layout(block_size: int, num_layers: int) -> KvLayout:
    return KvLayout("modelled", "float32", num_layers, 1, _HEAD_DIM, block_size)


class ModelledRunner:
    """Computes at once what `ModelledSteps` spreads over a step. `on_wrong` hears of KV that no
    correct cluster would read: then the token is wrong as well."""

    def __init__(
        self,
        layout: KvLayout,
        memory: PoolMemory,
        layer_groups: int,
        on_wrong: Callable[[str], None],
    ) -> None:
        cells = np.frombuffer(memory.buffer, dtype=np.int32)  # type: ignore[call-overload]
        shape = (-1, layout.num_layers, 2, layout.block_size, _HEAD_DIM)
        self._cells: Cells = cells[: memory.nbytes // 4].reshape(shape)
        self._layers = layout.num_layers
        self._size = layout.block_size
        self._on_wrong = on_wrong
        self._last: dict[int, int] = {}  # sequence -> what the last step sampled
        groups = min(layer_groups, layout.num_layers)
        self.group_ends = [layout.num_layers * (g + 1) // groups for g in range(groups)]

    def launch(
        self,
        batch: Batch,
        on_layers: LayerCallback | None = None,
        before_layers: LayerGate | None = None,
    ) -> Launched:
        raise InternalError("a modelled step takes virtual time: it is run by ModelledSteps")

    def close(self) -> None:
        """There is nothing to free."""

    def begin(self, batch: Batch) -> tuple[BatchItem, ...]:
        """The batch's items, with the tokens that they follow."""
        return resolve(batch, self._last).items

    def write(self, items: Sequence[BatchItem], layer_begin: int, layer_end: int) -> None:
        """Make KV of these layers final. An item may build on what another one of the same step
        writes; that one begins further in front."""
        for item in sorted(items, key=lambda item: item.start):
            chain = self._chain_before(item)
            for position, token in enumerate(item.tokens, item.start):
                chain = _link(chain, token)
                slot = self._cells[item.blocks[position // self._size], :, :, position % self._size]
                slot[layer_begin:layer_end, :, 0] = token
                for layer in range(layer_begin, layer_end):
                    slot[layer, :, 1] = chain ^ layer

    def end(self, items: Sequence[BatchItem]) -> BatchResult:
        tokens = tuple(self._sample(item) for item in items)
        self._last = last_tokens(items, tokens)
        return BatchResult(tokens)

    def _chain_before(self, item: BatchItem) -> int:
        if item.start == 0:
            return 0
        before = item.start - 1
        return int(self._cells[item.blocks[before // self._size], 0, 0, before % self._size, 1])

    def _sample(self, item: BatchItem) -> SampledToken | None:
        if item.sample is None:
            return None
        length = item.start + len(item.tokens)
        found = self._read(item.blocks, length)
        if found != context_kv(self._tokens(item.blocks, length), self._layers):
            self._on_wrong(f"a step read wrong KV in blocks {item.blocks} of {length} tokens")
        return SampledToken(next_token(found, item.sample), item.sample.index)

    def _read(self, blocks: Sequence[int], length: int) -> bytes:
        """KV of `length` tokens, as [layers, 2, tokens, 2]."""
        used = np.array(blocks[: -(-length // self._size)])
        kv = self._cells[used].transpose(1, 2, 0, 3, 4)
        found: Cells = kv.reshape(self._layers, 2, -1, _HEAD_DIM)[:, :, :length]
        return found.tobytes()

    def _tokens(self, blocks: Sequence[int], length: int) -> list[int]:
        used = np.array(blocks[: -(-length // self._size)])
        tokens: list[int] = self._cells[used, 0, 0, :, 0].ravel()[:length].tolist()
        return tokens


def _link(chain: int, token: int) -> int:
    return (chain * 1_000_003 + token + 1) & 0x7FFFFFFF


def context_kv(tokens: Sequence[int], num_layers: int) -> bytes:
    """What the KV of a context must be, [layers, 2, tokens, 2]."""
    chain, chains = 0, []
    for token in tokens:
        chain = _link(chain, token)
        chains.append(chain)
    kv = np.empty((num_layers, 2, len(tokens), _HEAD_DIM), dtype=np.int32)
    kv[..., 0] = tokens
    layers = np.arange(num_layers, dtype=np.int32)[:, None, None]
    kv[..., 1] = np.array(chains, dtype=np.int32)[None, None, :] ^ layers
    return kv.tobytes()


def next_token(kv: bytes, sample: SampleRequest) -> int:
    """Depends on every byte of the KV, on the seed (unless greedy) and on the output index."""
    params = sample.params
    seed = params.seed if params.temperature > 0 else 0
    banned = sample.stop_ids if sample.index < params.min_tokens else ()
    for salt in range(len(banned) + 1):
        state = blake2b(kv, digest_size=4)
        state.update(b"%d:%d:%d" % (seed, sample.index, salt))
        token = int.from_bytes(state.digest(), "little") % VOCAB
        if token not in banned:
            return token
    raise InternalError("every draw was a banned token")


def expected_answer(
    prompt: Sequence[int], params: SamplingParams, num_layers: int, eos_ids: tuple[int, ...] = ()
) -> list[int]:
    """All tokens of the answer that a cluster of modelled runners must give."""
    stops = (() if params.ignore_eos else eos_ids) + params.stop_token_ids
    context, answer = list(prompt), list[int]()
    while len(answer) < params.max_tokens:
        token = next_token(
            context_kv(context, num_layers), SampleRequest(params, len(answer), stops)
        )
        context.append(token)
        answer.append(token)
        if token in stops and len(answer) > params.min_tokens:
            break
    return answer
