"""Where tenants come from, as a plain value."""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import ConfigError
from baton.rpc.redis_options import RedisOptions

IN_REDIS = "redis"  # as the value of --keys


@dataclass(frozen=True, slots=True)
class TenancyOptions:
    """`keys` is a file, or IN_REDIS; `plain_keys` are those of --api-key. Raises ConfigError."""

    keys: str = ""
    tenants: str = ""
    plain_keys: tuple[str, ...] = ()
    redis: RedisOptions | None = None
    local_without_redis: bool = True

    def __post_init__(self) -> None:
        if bool(self.keys) != bool(self.tenants):
            raise ConfigError("--keys and --tenants belong together: keys are of tenants")
        if self.keys == IN_REDIS and self.redis is None:
            raise ConfigError("--keys redis needs --redis")

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return not self.keys and not self.plain_keys
