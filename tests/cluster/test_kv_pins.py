"""A prompt that is pinned in a node's store stays, whatever comes and whoever crashes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.conftest import Cluster, ClusterFactory
from tests.cluster.test_kv_store import BLOCK, BLOCKS, FLAGS, PROMPT, ask, kill, member, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def figures(cluster: Cluster) -> dict[str, Any]:
    """What the store counts."""
    return dict(member(cluster, "stores", "store-0")["store"])


def test_a_pinned_prompt_survives_a_flood(start_cluster: ClusterFactory) -> None:
    """Without NVMe, what is evicted is lost; the pools of the workers are lost with them."""
    flags = ("--store-memory-mib", "16", *FLAGS[2:])  # 170 blocks
    with start_cluster(*flags) as cluster:
        other = [4 + (7 * number + 1) % 3000 for number in range(len(PROMPT))]
        ask(cluster, other)
        answer, _ = ask(cluster, PROMPT, cache_pin_s=3600)
        until(lambda: figures(cluster)["pinned"] == BLOCKS)
        for shift in range(4):
            ask(cluster, [4 + (11 * number + shift) % 3000 for number in range(len(PROMPT))])
        until(lambda: figures(cluster)["stored"] >= 6 * BLOCKS)
        assert figures(cluster)["evicted"] > BLOCKS

        for name in ("prefill-0", "decode-0"):
            kill(cluster, "workers", name)
        assert ask(cluster, other)[1] == 0
        assert ask(cluster, PROMPT) == (answer, BLOCKS * BLOCK)
