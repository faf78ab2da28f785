"""Reusing KV changes no token, whoever computed it, wherever it was kept.

Conversations of several tenants, which branch, run through two prefill and two decode workers and
a store, all far too small to keep everything. Then the same prompts are asked of workers that reuse
nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.cluster.conftest import Cluster, ClusterFactory
from tests.models import VOCAB_SIZE, make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

REQUESTS = 520
TENANTS = ("", "blue", "green")
MAX_TOKENS = 8
BLOCK = 16
AT_ONCE = 12

# 32 KiB are one block: pools of 2,560 tokens, 32 blocks of memory, some 100 on disk.
TIGHT = (
    *("--block-size", str(BLOCK), "--num-blocks", "160", "--dtype", "float32"),
    *("--prefill", "2", "--decode", "2"),
)
STORE = ("--store-memory-mib", "1", "--store-gib", "0.004")


@dataclass(frozen=True)
class Asked:
    prompt: tuple[int, ...]
    salt: str
    answer: tuple[int, ...]
    cached_tokens: int


@dataclass
class Conversation:
    salt: str
    said: tuple[int, ...]
    turns: int = 0


@dataclass
class Load:
    """Each turn repeats everything said, and adds to it; now and then somebody goes back."""

    draw: random.Random = field(default_factory=lambda: random.Random(4))
    asked: list[Asked] = field(default_factory=list)
    begun: int = 0

    def __post_init__(self) -> None:
        self.systems = [self.tokens(70) for _ in range(3)]
        self.past: list[Conversation] = []

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.draw.randrange(4, VOCAB_SIZE) for _ in range(count))

    def next(self) -> Conversation:
        """A new conversation, or a branch of an old one."""
        if self.past and self.draw.random() < 0.7:
            old = self.draw.choice(self.past[-40:])
            if old.turns < 8:
                words = self.tokens(self.draw.randrange(1, 40))
                return Conversation(old.salt, old.said + words, old.turns)
        salt = self.draw.choice(TENANTS)
        return Conversation(salt, self.draw.choice(self.systems) + self.tokens(20))

    async def run(self, cluster: Cluster) -> None:
        async with (
            httpx.AsyncClient(base_url=cluster.url, timeout=120, trust_env=False) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(AT_ONCE):
                group.create_task(self.user(client))

    async def user(self, client: httpx.AsyncClient) -> None:
        while self.begun < REQUESTS:
            self.begun += 1
            talk = self.next()
            asked = await ask(client, talk.said, talk.salt)
            self.asked.append(asked)
            talk.said += asked.answer
            talk.turns += 1
            self.past.append(talk)


async def ask(client: httpx.AsyncClient, prompt: tuple[int, ...], salt: str) -> Asked:
    body = {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "cache_salt": salt,
    }
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    usage = answer["usage"]
    return Asked(
        prompt,
        salt,
        tuple(answer["choices"][0]["token_ids"]),
        usage["prompt_tokens_details"]["cached_tokens"],
    )


async def ask_again(cluster: Cluster, asked: Sequence[Asked]) -> list[Asked]:
    """The same prompts, in the same order."""
    room = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=120, trust_env=False) as client:

        async def one(before: Asked) -> Asked:
            async with room:
                return await ask(client, before.prompt, before.salt)

        return await asyncio.gather(*map(one, asked))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny")


def test_reuse_changes_no_token(
    start_cluster: ClusterFactory, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_DISK_SEGMENT_MIB", "1")
    monkeypatch.setenv("BATON_EARLY_PREFILL", "on")
    load = Load()
    with start_cluster(str(model), *TIGHT, *STORE, "--store-dir", str(tmp_path)) as cluster:
        asyncio.run(load.run(cluster))
        cluster.assert_idle()
        (store,) = cluster.status()["stores"]
        assert store["blocks"]["cached"] > 0
        assert sum(store["blocks"].values()) == store["num_blocks"]
        assert list(tmp_path.glob("segment-*")), "the disk was not used"
    reused = sum(asked.cached_tokens for asked in load.asked)
    assert reused > 20 * REQUESTS, "next to nothing was reused"
    with start_cluster(str(model), *TIGHT, "--colocated", "--no-prefix-caching") as plain:
        again = asyncio.run(ask_again(plain, load.asked))
    assert not any(asked.cached_tokens for asked in again)
    wrong = [
        (before.prompt, before.answer, after.answer)
        for before, after in zip(load.asked, again, strict=True)
        if before.answer != after.answer
    ]
    assert not wrong, f"{len(wrong)} of {REQUESTS} answers differ, such as {wrong[0]}"


def test_tenants_with_a_salt_share_with_nobody(start_cluster: ClusterFactory, model: Path) -> None:
    prompt = tuple(range(4, 4 + 6 * BLOCK + 1))
    with start_cluster(str(model), *TIGHT, "--store-memory-mib", "4") as cluster:

        async def run() -> None:
            async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as client:
                seen: Counter[str] = Counter()
                for salt in ("a", "b", "", "a", "b", "", "c"):
                    asked = await ask(client, prompt, salt)
                    assert (asked.cached_tokens > 0) == (seen[salt] > 0), salt
                    seen[salt] += 1

        asyncio.run(run())
