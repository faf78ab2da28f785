"""Keys of a prompt's blocks, computed once per request, and only as far as they can be of use.

Hashing costs about a microsecond per block. A short prompt is hashed whole; a long one in
stretches, between which other requests go on, and which end where nobody in the cluster has the
prefix any more.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache

from baton.hashing import block_keys, root_key
from baton.types.fleet import KvLayout
from conductor.prefix_map import PrefixMap
from conductor.router import GROUP_BLOCKS

STRETCH_BLOCKS = 256  # a third of a millisecond


async def prompt_keys(
    prompt: tuple[int, ...], layout: KvLayout, cache_salt: str, prefix_map: PrefixMap
) -> bytes:
    """16 bytes for each of the prompt's first full blocks; of the prefix group's at least."""
    size = layout.block_size
    full = len(prompt) // size
    if not prefix_map.num_blocks:
        full = min(full, GROUP_BLOCKS)
    parent = _root(layout, cache_salt)
    keys: list[bytes] = []
    while len(keys) < full:
        if keys:
            if not prefix_map.knows(parent):
                break
            await asyncio.sleep(0)
        end = min(len(keys) + STRETCH_BLOCKS, full)
        keys += block_keys(parent, prompt[len(keys) * size : end * size], size)
        parent = keys[-1]
    return b"".join(keys)


@lru_cache(maxsize=256)
def _root(layout: KvLayout, cache_salt: str) -> bytes:
    return root_key(layout.model, layout.dtype, layout.block_size, layout.quantization, cache_salt)
