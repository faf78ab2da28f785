"""`baton ray up`: a driver of Ray that keeps one cluster running until it is stopped."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import signal
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Self

from baton.client.http import Client
from baton.errors import BatonError, ConfigError
from baton.ray.commands import Listening
from baton.ray.config import ClusterConfig
from baton.ray.place import Events, Place
from baton.ray.supervisor import Supervisor

_ASK_S = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def up(
    config: ClusterConfig, events: Events, api_key: str, tls: ssl.SSLContext | None = None
) -> None:
    """Returns after an orderly stop. `tls` is what is trusted of conductors, when not what the
    system trusts. Raises ConfigError without Ray, and StartFailed."""
    disconnect = connect_ray()
    try:
        place = make_place(config, os.environ)
        async with HttpAsks(api_key, tls) as asks:
            supervisor = Supervisor(config, place, asks, events)
            loop = asyncio.get_running_loop()
            for number in _SIGNALS:
                loop.add_signal_handler(number, supervisor.stop)
            try:
                await supervisor.run(lambda where: _say_ready(config, events, where))
            finally:
                for number in _SIGNALS:
                    loop.remove_signal_handler(number)
    finally:
        disconnect()


def connect_ray() -> Callable[[], None]:
    """Join the Ray cluster of this machine or of RAY_ADDRESS. Returns what leaves it again."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed here: pip install 'baton-llm[ray]'")
    # Every line of every process: equal ones of two workers are not the same news.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=True)
    except ConnectionError as error:
        raise ConfigError(
            "no Ray cluster was found. On this machine: `ray start --head`. From elsewhere: "
            "`ray job submit --address http://HEAD:8265 --working-dir . -- baton ray up ...`, or "
            "RAY_ADDRESS=HEAD:6379 on a machine of the cluster"
        ) from error
    return ray.shutdown


def make_place(config: ClusterConfig, environ: Mapping[str, str]) -> Place:
    from baton.ray.ray_place import RayPlace

    return RayPlace(config.cluster_name, process_environ(config, environ))


def process_environ(config: ClusterConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """What every process gets beside its node's environment: what of ours is baton's, a token that
    lives as long as this cluster, and the Redis that conductors share."""
    ours = {name: value for name, value in environ.items() if name.startswith("BATON_")}
    ours.pop("BATON_REDIS", None)
    if config.redis:  # not as a flag, which others could read: it may have a password
        ours["BATON_REDIS"] = config.redis
    ours.setdefault("BATON_CLUSTER_TOKEN", secrets.token_urlsafe(32))
    # Weights and activations in huge pages: CPU steps take a tenth less time (Linux, glibc 2.35).
    return {"PYTHONUNBUFFERED": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **ours}


class HttpAsks:
    """Asks conductors as `baton status` does. Use as an async context manager."""

    def __init__(self, api_key: str, tls: ssl.SSLContext | None = None) -> None:
        self._api_key = api_key
        self._tls = tls
        self._clients: dict[str, Client] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def cluster(self, conductor: Listening) -> Mapping[str, Any]:
        try:
            return await (await self._client(conductor)).cluster()
        except BatonError:  # it is busy or restarting; deadlines are our caller's
            return {}

    async def ready(self, conductor: Listening) -> bool:
        try:
            return await (await self._client(conductor)).ready()
        except BatonError:
            return False

    async def _client(self, conductor: Listening) -> Client:
        if conductor.url not in self._clients:
            client = Client(conductor.url, timeout_s=_ASK_S, api_key=self._api_key, tls=self._tls)
            self._clients[conductor.url] = await self._stack.enter_async_context(client)
        return self._clients[conductor.url]


def _say_ready(config: ClusterConfig, events: Events, where: Sequence[Listening]) -> None:
    urls = ",".join(each.url for each in where)
    pools = ", ".join(f"{pool.replicas} {name}" for name, pool in config.pools.items())
    grpc = ",".join(each.grpc for each in where)
    events.result(
        "ready",
        f"ready  {urls}  grpc {grpc}  {pools}",
        urls=urls,
        http=where[0].http,
        grpc=where[0].grpc,
        pid=os.getpid(),
    )
