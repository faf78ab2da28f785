"""`baton keys`: API keys of tenants, in a file or in Redis. A key is shown once, when made."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import orjson
import typer
from rich.console import Console
from rich.table import Table

from baton.cli.options import Json
from baton.errors import ConfigError
from baton.keys.file import KeyFile
from baton.keys.key import (
    ApiKey,
    check_tenant_name,
    digest_of,
    format_expiry,
    new_key,
    parse_duration,
)
from baton.keys.store import KeyStore, open_redis_keys
from baton.rpc.redis_options import RedisOptions

Result = TypeVar("Result")

keys = typer.Typer(help="API keys of tenants: create, list, rotate, revoke.", no_args_is_help=True)

File = Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Where keys are kept.")]
Redis = Annotated[
    str,
    typer.Option(
        "--redis",
        envvar="BATON_REDIS",
        metavar="URL",
        help="Where keys are kept when there is no --file; also with the other BATON_REDIS_*.",
    ),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="As `baton keys list` shows it.")]


@keys.command("create")
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: File = None,
    redis: Redis = "",
    expires: Annotated[str, typer.Option(metavar="TIME", help="As 30d; never without.")] = "",
    json: Json = False,
) -> None:
    """Make a key and print it. Only its SHA-256 is kept: it cannot be shown again."""
    check_tenant_name(tenant)
    secret, key = _make(tenant, _in(expires) if expires else None)
    _with_store(file, redis, lambda store: store.add(key))
    _show(secret, key, json)


@keys.command("rotate")
def rotate(
    key_id: KeyId,
    file: File = None,
    redis: Redis = "",
    grace: Annotated[str, typer.Option(metavar="TIME", help="How long the old one holds.")] = "24h",
    json: Json = False,
) -> None:
    """Make another key for the same tenant; the old one ends after a while."""
    end_s = _in(grace)

    async def act(store: KeyStore) -> tuple[str, ApiKey]:
        old = next((key for key in (await store.read()).keys if key.id == key_id), None)
        if old is None:
            raise ConfigError(f"there is no key {key_id!r}: see `baton keys list`")
        secret, key = _make(old.tenant, None)
        await store.add(key)  # first: a key that is lost leaves the old one as it was
        await store.replace(key_id, lambda old: replace(old, expires_s=_sooner(old, end_s)))
        return secret, key

    secret, key = _with_store(file, redis, act)
    _show(secret, key, json)


@keys.command("revoke")
def revoke(key_id: KeyId, file: File = None, redis: Redis = "") -> None:
    """Take a key away at once: conductors refuse it within two seconds."""
    gone = _with_store(file, redis, lambda store: store.replace(key_id, lambda _: None))
    typer.echo(f"revoked {gone.id} of {gone.tenant}", err=True)


@keys.command("list")
def list_keys(file: File = None, redis: Redis = "", json: Json = False) -> None:
    """What is known of the keys; not the keys themselves."""
    known = _with_store(file, redis, lambda store: store.read()).keys
    if json:
        typer.echo(orjson.dumps([_body(key) for key in known]).decode())
        return
    table = Table()
    for name in ("id", "tenant", "expires"):
        table.add_column(name)
    now_s = time.time()
    for key in known:
        ended = "" if key.holds(now_s) else "  (ended)"
        table.add_row(key.id, key.tenant, f"{format_expiry(key.expires_s)}{ended}")
    Console().print(table)


def _make(tenant: str, expires_s: float | None) -> tuple[str, ApiKey]:
    secret = new_key()
    return secret, ApiKey(tenant, digest_of(secret), expires_s)


def _in(duration: str) -> float:
    return time.time() + parse_duration(duration)


def _sooner(key: ApiKey, end_s: float) -> float:
    return end_s if key.expires_s is None else min(end_s, key.expires_s)


def _show(secret: str, key: ApiKey, json: bool) -> None:
    """Nothing but the key on standard output, so that it can go into a secret store."""
    if json:
        typer.echo(orjson.dumps(_body(key) | {"key": secret}).decode())
        return
    typer.echo(f"key {key.id} of {key.tenant}; it is not shown again:", err=True)
    typer.echo(secret)


def _body(key: ApiKey) -> dict[str, str | None]:
    ends = None if key.expires_s is None else format_expiry(key.expires_s)
    return {"id": key.id, "tenant": key.tenant, "expires": ends}


def _with_store(
    file: Path | None, redis: str, act: Callable[[KeyStore], Awaitable[Result]]
) -> Result:
    async def run() -> Result:
        store = _open(file, redis)
        try:
            return await act(store)
        finally:
            await store.aclose()

    return asyncio.run(run())


def _open(file: Path | None, redis: str) -> KeyStore:
    if file is not None:
        return KeyFile(file)
    if not redis:
        raise ConfigError("say where keys are kept: --file FILE or --redis URL")

    def given(name: str, default: str = "") -> str:
        return os.environ.get(f"BATON_{name}", default)

    return open_redis_keys(
        RedisOptions(
            url=redis,
            cluster=given("CLUSTER_NAME", "default"),
            prefix=given("REDIS_PREFIX", "baton"),
            username=given("REDIS_USERNAME"),
            password=given("REDIS_PASSWORD"),
            password_file=given("REDIS_PASSWORD_FILE"),
            ca_file=given("REDIS_CA_FILE"),
            cert_file=given("REDIS_CERT_FILE"),
            key_file=given("REDIS_KEY_FILE"),
        )
    )
