"""Who may ask: keys and tenants as they are now, read again when they change.

A file that is wrong changes nothing: what was read before goes on to count, and the log says what
is wrong. So does what was read of Redis while that is away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from baton.errors import ConfigError, InvalidApiKey, NoWorker, RegistryUnavailable
from baton.keys.key import ApiKey, KeySet, digest_of
from conductor.tenants.sources import Source
from conductor.tenants.tenant import ANYBODY, KEY_HOLDER, Tenant

POLL_S = 1.0  # between looks whether something has changed
MAX_KEY_LENGTH = 512  # characters of a key that are looked at

Value = TypeVar("Value")

log = logging.getLogger(__name__)


class KeysUnknown(NoWorker):
    """No key can be checked yet: where they are kept has not answered since this process began."""

    code = "keys_unknown"


class Directory:
    """Keys and tenants. Without any source everybody may ask."""

    def __init__(
        self,
        keys: Source[KeySet] | None = None,
        tenants: Source[Mapping[str, Tenant]] | None = None,
        plain_keys: tuple[str, ...] = (),
        on_reload: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._key_source = keys
        self._tenant_source = tenants
        self._plain = KeySet(ApiKey(KEY_HOLDER.name, digest_of(key)) for key in plain_keys)
        self._keys: KeySet | None = None
        self._tenants: Mapping[str, Tenant] = {}
        self._on_reload = on_reload
        self._epoch_s = time.time() - asyncio.get_running_loop().time()

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return self._key_source is None and not len(self._plain)

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """In the order of their file."""
        return tuple(self._tenants.values())

    def find(self, authorization: str | None) -> Tenant:
        """Raises InvalidApiKey unless `authorization` is `Bearer KEY` with a key that holds, or
        KeysUnknown. No message repeats the key."""
        if self.is_open:
            return ANYBODY
        scheme, _, given = (authorization or "").partition(" ")
        given = given.strip()
        if scheme.lower() != "bearer" or not given:
            raise InvalidApiKey("send an API key in the header `Authorization: Bearer KEY`")
        if len(given) <= MAX_KEY_LENGTH:
            now_s = self._epoch_s + asyncio.get_running_loop().time()
            if self._plain.find(given, now_s) is not None:
                return KEY_HOLDER
            if self._key_source is not None and self._keys is None:
                raise KeysUnknown("API keys cannot be checked yet: try again in a second")
            key = None if self._keys is None else self._keys.find(given, now_s)
            if key is not None and (tenant := self._tenants.get(key.tenant)) is not None:
                return tenant
        raise InvalidApiKey("this API key is unknown, revoked, or its time has passed")

    async def load(self) -> None:
        """Read everything for the first time. Raises ConfigError. Redis may be away."""
        if self._tenant_source is not None:
            self._tenants = await self._tenant_source.read() or {}
        if self._key_source is not None:
            try:
                self._keys = await self._key_source.read()
            except RegistryUnavailable as error:
                log.warning("no API key is known yet: %s", error)
        self._say("read")

    async def run(self) -> None:
        """Read again what changes, until cancelled."""
        if self._key_source is None and self._tenant_source is None:
            return
        while True:
            await asyncio.sleep(POLL_S)
            tenants = await self._reload(self._tenant_source)
            keys = await self._reload(self._key_source)
            self._tenants = self._tenants if tenants is None else tenants
            self._keys = self._keys if keys is None else keys
            if tenants is not None or keys is not None:
                self._say("read again")
                self._on_reload("ok")

    async def _reload(self, source: Source[Value] | None) -> Value | None:
        if source is None:
            return None
        try:
            return await source.read()
        except ConfigError as error:
            log.error("what was read before goes on to count: %s", error)
            self._on_reload("error")
        except RegistryUnavailable:
            pass  # RedisCalls has logged it
        return None

    async def aclose(self) -> None:
        for source in (self._key_source, self._tenant_source):
            if source is not None:
                await source.aclose()

    def _say(self, what: str) -> None:
        if self.is_open:
            return
        keys = () if self._keys is None else self._keys.keys
        log.info("%s: %d API keys of %d tenants", what, len(keys), len(self._tenants))
        strangers = sorted({key.tenant for key in keys} - self._tenants.keys())
        if strangers:
            log.warning("keys of tenants that are not there are refused: %s", strangers[:10])
