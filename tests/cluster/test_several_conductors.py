"""Two conductors over Redis, one prefill and one decode worker that find them there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.config import parse_config
from baton.rpc.registry import open_registry
from baton.worker.cluster_options import ClusterOptions
from tests.cluster.by_hand import ByHand, Conductor, by_hand, until
from tests.redis_server import BINARY, WHY_NOT

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.skipif(BINARY is None, reason=WHY_NOT),
]

WORKERS = ("prefill-0", "decode-0")
PROMPT = list(range(5, 90))
LONG = 1800  # tokens: many seconds of decoding


@pytest.fixture(params=["plain", "secured"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ByHand]:
    with by_hand(tmp_path, secured=request.param == "secured") as running:
        yield running


def ask(conductor: Conductor, **more: Any) -> list[int]:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **more}
    answer = conductor.post("/v1/completions", body | {"return_token_ids": True})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def start_long_answer(conductor: Conductor) -> Iterator[str]:
    """The events of an answer that is still being decoded long after the first one."""
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": LONG, "ignore_eos": True}
    url = f"http://{conductor.http}/v1/completions"
    with httpx.stream("POST", url, json=body | {"stream": True}, trust_env=False) as reply:
        yield from reply.iter_lines()


def announced(cluster: ByHand) -> set[str]:
    """The names of the conductors in Redis."""

    async def look() -> set[str]:
        options = parse_config(ClusterOptions, ["--cluster-name=test"], cluster.secrets, "test")
        assert options.redis_options is not None
        registry = open_registry(options.redis_options)
        names = {info.name for info in await registry.conductors()}
        await registry.aclose()
        return names

    return asyncio.run(look())


def test_conductors_and_redis_may_come_and_go(cluster: ByHand) -> None:
    one, two = cluster.conductor("c-1", "--lease-ttl", "3"), cluster.conductor("c-2")
    cluster.worker("prefill", "prefill-0")
    cluster.worker("decode", "decode-0", "--orphan-timeout", "1")
    until(lambda: one.sees_live(*WORKERS) and two.sees_live(*WORKERS))
    answer = ask(one)
    assert ask(two) == answer

    # Without Redis everything goes on, and a third conductor is found when Redis is back.
    cluster.redis.kill()
    assert ask(one) == ask(two) == answer
    third = cluster.conductor("c-3")
    assert not third.workers()
    cluster.redis.start()
    until(lambda: third.sees_live(*WORKERS))
    assert ask(third) == ask(one) == ask(two) == answer
    until(lambda: announced(cluster) == {"c-1", "c-2", "c-3"})
    listed = {(each["name"], each["address"]) for each in two.get("/cluster").json()["conductors"]}
    assert listed == {("c-1", one.http), ("c-2", two.http), ("c-3", third.http)}

    # One is killed in the middle of an answer, which nobody adopts: its blocks come back.
    events = start_long_answer(one)
    next(events)
    until(lambda: two.workers()["decode-0"]["running"] == 1)
    cluster.kill("c-1")
    with pytest.raises(httpx.HTTPError):
        list(events)
    until(lambda: "no conductor adopted it within 1 s" in cluster.log_of("decode-0"))
    until(two.is_idle)
    assert ask(two) == ask(third) == answer
    assert two.sees_live(*WORKERS)

    # Its place is taken by a new one, and the workers forget the old one.
    again = cluster.conductor("c-1")
    until(lambda: again.sees_live(*WORKERS))
    assert ask(again) == answer
    for worker in WORKERS:
        until(
            lambda worker=worker: (
                f"the conductor at {one.for_workers} is gone" in cluster.log_of(worker)
            )
        )
    until(lambda: all(conductor.is_idle() for conductor in (two, third, again)))
    assert set(cluster.stop_all().values()) == {0}
    assert not announced(cluster)
