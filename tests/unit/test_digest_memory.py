"""Digests do not depend on where the pool is."""

from __future__ import annotations

import pytest
import torch

from baton.kv.digest import Verify, block_digests
from baton.kv.transport import memory
from baton.kv.transport.base import PoolMemory
from baton.types.fleet import KvLayout

LAYOUT = KvLayout("model", "float32", num_layers=3, kv_heads=2, head_dim=16, block_size=16)


@pytest.mark.parametrize("mode", [Verify.SAMPLE, Verify.FULL])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_copied_pools_have_the_digests_of_viewed_ones(
    mode: Verify, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor on the CPU stands in for one on a GPU: `.cpu()` gives the same bytes."""
    monkeypatch.setattr(memory, "_COPY_BYTES", at_once * 2 * LAYOUT.layer_bytes)
    content = torch.randint(256, (5 * LAYOUT.block_bytes + 7,), dtype=torch.uint8)
    here = PoolMemory(0, len(content), "cpu", content.numpy())
    there = PoolMemory(0, len(content), "cuda:0", content)
    ours, theirs = (block_digests(pool, LAYOUT, [4, 0, 3], 1, 3, mode) for pool in (here, there))
    assert ours == theirs
