"""A conductor is killed while it streams: the client goes on at the other one, and has every token
once; the tokens are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest

from baton.client.http import Client, Prompt
from tests.cluster.by_hand import ByHand, Conductor, by_hand, until
from tests.cluster.conftest import ClusterFactory
from tests.redis_server import BINARY, WHY_NOT, redis_server

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.skipif(BINARY is None, reason=WHY_NOT),
]

WORKERS = ("prefill-0", "decode-0", "decode-1")
MAX_TOKENS = 500
KILL_AT = 60  # tokens


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ByHand]:
    with by_hand(tmp_path) as running:
        yield running


def prompt(temperature: float) -> Prompt:
    options = {"temperature": temperature, "ignore_eos": True, "return_token_ids": True}
    if temperature:
        options["seed"] = 21
    return Prompt(tuple(range(5, 90)), max_tokens=MAX_TOKENS, options=options)


async def read(cluster: ByHand, urls: str, asked: Prompt, victim: str = "") -> list[int]:
    """The ids of a whole answer; `victim` is killed in the middle."""
    tokens: list[int] = []
    async with Client(urls) as client, aclosing(client.stream(asked)) as pieces:
        async for piece in pieces:
            tokens += piece.token_ids
            if victim in cluster.processes and len(tokens) >= KILL_AT:
                cluster.kill(victim)
            if piece.usage is not None:
                assert piece.usage.completion_tokens == MAX_TOKENS
    return tokens


def value_of(conductor: Conductor, metric: str) -> float:
    lines = conductor.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(metric))


def test_a_client_of_a_killed_conductor_gets_the_rest_from_another(cluster: ByHand) -> None:
    survivor = cluster.conductor("conductor-0")
    for name in WORKERS:
        cluster.worker(name.split("-")[0], name)
    until(lambda: survivor.sees_live(*WORKERS))
    for number, temperature in enumerate((0.0, 0.8)):
        asked = prompt(temperature)
        undisturbed = asyncio.run(read(cluster, survivor.http, asked))
        assert len(undisturbed) == MAX_TOKENS
        name = f"conductor-{number + 1}"
        victim = cluster.conductor(name)
        until(lambda victim=victim: victim.sees_live(*WORKERS))  # type: ignore[misc]
        urls = f"{victim.http},{survivor.http}"
        assert asyncio.run(read(cluster, urls, asked, victim=name)) == undisturbed
        assert value_of(survivor, 'baton_reconnects_total{how="adopted"}') == number + 1
    assert not value_of(survivor, 'baton_reconnects_total{how="again"}')
    until(survivor.is_idle)
    assert set(cluster.stop_all().values()) == {0}


def test_a_conductor_that_is_told_to_end_leaves_its_answers_to_another(cluster: ByHand) -> None:
    survivor = cluster.conductor("conductor-0")
    victim = cluster.conductor("conductor-1", "--drain-timeout", "0.2")
    cluster.worker("decode", "decode-0")
    until(lambda: survivor.sees_live("decode-0") and victim.sees_live("decode-0"))
    asked = prompt(0.8)
    undisturbed = asyncio.run(read(cluster, survivor.http, asked))

    async def end_the_victim() -> list[int]:
        tokens: list[int] = []
        async for token in ids_of(f"{victim.http},{survivor.http}", asked):
            tokens.append(token)
            if len(tokens) == KILL_AT:
                victim.process.send_signal(signal.SIGTERM)
        return tokens

    assert asyncio.run(end_the_victim()) == undisturbed
    assert value_of(survivor, 'baton_reconnects_total{how="adopted"}') == 1
    until(survivor.is_idle)
    assert set(cluster.stop_all().values()) == {0}


def test_serve_starts_several_conductors_and_any_of_them_may_die(
    start_cluster: ClusterFactory,
) -> None:
    asked = prompt(0.8)
    with (
        redis_server(secrets.token_hex(8)) as redis,
        start_cluster(
            *("--conductors", "2", "--redis", redis.url, "--colocated", "--decode", "1"),
            *("--dtype", "float32", "--kv-memory-mib", "64"),
        ) as cluster,
    ):
        first, second = cluster.ready["urls"].split(",")
        status = httpx.get(f"{second}/cluster", trust_env=False).json()

        async def lose_the_second() -> list[int]:
            tokens: list[int] = []
            whole = [token async for token in ids_of(first, asked)]
            async for token in ids_of(f"{second},{first}", asked):
                tokens.append(token)
                if len(tokens) == KILL_AT:
                    os.kill(status["conductors"][0]["pid"], signal.SIGKILL)
            assert tokens == whole
            return tokens

        assert len(asyncio.run(lose_the_second())) == MAX_TOKENS
        until(lambda: is_ready(second))  # started again, on the same port


async def ids_of(urls: str, asked: Prompt) -> AsyncIterator[int]:
    async with Client(urls) as client, aclosing(client.stream(asked)) as pieces:
        async for piece in pieces:
            for token in piece.token_ids:
                yield token


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_without_the_worker_that_had_it_the_answer_is_made_again(cluster: ByHand) -> None:
    survivor, victim = cluster.conductor("conductor-0"), cluster.conductor("conductor-1")
    for name in WORKERS:
        cluster.worker(name.split("-")[0], name)
    until(lambda: survivor.sees_live(*WORKERS) and victim.sees_live(*WORKERS))
    asked = prompt(0.8)
    undisturbed = asyncio.run(read(cluster, survivor.http, asked))

    async def lose_both() -> list[int]:
        tokens: list[int] = []
        urls = f"{victim.http},{survivor.http}"
        async with Client(urls) as client, aclosing(client.stream(asked)) as pieces:
            async for piece in pieces:
                tokens += piece.token_ids
                if "conductor-1" in cluster.processes and len(tokens) >= KILL_AT:
                    busy = [n for n, w in survivor.workers().items() if w["running"]]
                    cluster.kill("conductor-1")
                    for name in busy:
                        cluster.kill(name)
        return tokens

    assert asyncio.run(lose_both()) == undisturbed
    until(
        lambda: all(not w["running"] for w in survivor.workers().values() if w["state"] == "live")
    )
    assert set(cluster.stop_all().values()) == {0}
