"""Keys and tenants in files, and a conductor with fake workers that asks for them."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.fake_worker import FakeCluster, Scripts, echo, fake_server


def key_of(tenant: str, number: int = 0) -> str:
    """The same in every test."""
    return f"bt-{tenant}-{number}"


def key_line(tenant: str, number: int = 0, expires: str = "-") -> str:
    return f"{tenant} {hashlib.sha256(key_of(tenant, number).encode()).hexdigest()} {expires}\n"


class Files:
    """What an operator edits. Each change looks newer than the one before, as it does to people."""

    def __init__(self, folder: Path) -> None:
        self.keys = folder / "keys.txt"
        self.tenants = folder / "tenants.yaml"
        self._stamp = 1_000_000_000

    def write_tenants(self, *tenants: dict[str, Any]) -> None:
        self.write(self.tenants, yaml.safe_dump({"tenants": list(tenants)}))
        if not self.keys.exists():
            self.write(self.keys, "".join(key_line(tenant["name"]) for tenant in tenants))

    def write(self, path: Path, text: str) -> None:
        path.write_text(text)
        self._stamp += 10
        os.utime(path, (self._stamp, self._stamp))

    @asynccontextmanager
    async def server(self, script: Scripts = echo, **config: Any) -> AsyncIterator[FakeCluster]:
        files = {"keys": str(self.keys), "tenants": str(self.tenants)}
        async with fake_server(script, **(files | config)) as cluster:
            yield cluster


def client_of(cluster: FakeCluster, key: str | None) -> httpx.AsyncClient:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.AsyncClient(
        base_url=cluster.url, trust_env=False, verify=False, timeout=20, headers=headers
    )


async def ask(cluster: FakeCluster, key: str | None, **body: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 10} | body
    async with client_of(cluster, key) as client:
        return await client.post("/v1/completions", json=body)


async def until_status(cluster: FakeCluster, key: str, status: int) -> None:
    """Asks for the models until that is the answer."""
    async with asyncio.timeout(20), client_of(cluster, key) as client:
        while (await client.get("/v1/models")).status_code != status:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
