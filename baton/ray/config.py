"""`cluster.yaml`: what `baton ray up` should keep running, and what each process needs.

Frozen; an unknown key, or a value that cannot work, is a ConfigError that names it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from baton.errors import ConfigError

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
PoolRole = Literal["prefill", "decode", "elastic"]
FlagValue = bool | int | float | str | list[str]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
Amount = Annotated[float, Field(ge=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]

_MIB = 1 << 20
# What follows from the placement, or is said once for all: a second word on it could only disagree.
_OURS = {
    *("name", "node", "listen", "advertise", "conductor", "store", "redis", "cluster_name"),
    *("model", "model_name", "announce", "exit_with_parent", "config", "host", "grpc_host"),
    *("port", "grpc_port", "internal_port", "drain_timeout", "role", "advise"),
    *("tls_cert", "tls_key", "tls_ca", "tls_peer_name"),
}
_OF_ENGINE = {"dtype", "block_size", "transport", "verify"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _check_flags(flags: Mapping[str, FlagValue]) -> None:
    for key in flags:
        if key.replace("-", "_") in _OURS:
            raise ValueError(f"flags: {key} is set by baton ray up itself")
        if key.replace("-", "_") in _OF_ENGINE:
            raise ValueError(f"flags: {key} must be the same everywhere: set it under engine")


class Needs(_Part):
    """What one process takes from Ray's books, and how it is started."""

    num_cpus: Amount = 1
    num_gpus: Amount = 0
    memory_mib: Annotated[int, Field(ge=0)] = 0
    resources: dict[str, Amount] = Field(default_factory=dict)
    flags: dict[str, FlagValue] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_flags(self.flags)
        for key in self.resources:
            if key in ("CPU", "GPU", "memory"):
                raise ValueError(f"resources: {key} has a key of its own, such as num_cpus")
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError("num_gpus: a part of a GPU, or whole ones")
        return self

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray counts it. Never empty: a placement group has no empty bundles."""
        amounts = {
            "CPU": self.num_cpus,
            "GPU": self.num_gpus,
            "memory": float(self.memory_mib * _MIB),
            **self.resources,
        }
        wanted = {name: float(amount) for name, amount in amounts.items() if amount}
        return wanted or {"CPU": 0.001}


class Engine(_Part):
    """What workers and stores must agree on; left out: their defaults."""

    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    block_size: Annotated[int, Field(gt=0)] | None = None
    transport: Literal["auto", "nixl", "nccl", "shm"] | None = None
    verify: Literal["off", "sample", "full"] | None = None

    @property
    def flags(self) -> dict[str, FlagValue]:
        return self.model_dump(exclude_none=True)


class Tls(_Part):
    """Files (PEM) on every node, by which the processes know each other."""

    cert: str
    key: str
    ca: str
    peer_name: str = ""


class Conductors(Needs):
    """Conductor number i listens on `port` + i and `grpc_port` + i, unless they are 0 (any)."""

    replicas: Annotated[int, Field(ge=1)] = 1
    strategy: Strategy = "SPREAD"
    port: Port = 8000
    grpc_port: Port = 50051


class Pool(Needs):
    """Workers of one kind. `role` is the pool's name when that is a role."""

    role: PoolRole
    replicas: Annotated[int, Field(ge=0)] = 1
    min_replicas: Annotated[int | None, Field(ge=0)] = None
    max_replicas: Annotated[int | None, Field(ge=0)] = None
    strategy: Strategy = "PACK"

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if not self.least <= self.replicas <= self.most:
            raise ValueError(
                f"replicas: {self.replicas} is not between min_replicas ({self.least}) and "
                f"max_replicas ({self.most})"
            )
        return self

    @property
    def least(self) -> int:
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def scales(self) -> bool:
        return self.most > self.least


class Store(_Part):
    """One on each node that has workers. `port` 0 is any free one."""

    memory_mib: Annotated[int, Field(ge=1)] = 1024
    disk_dir: str = ""
    disk_gib: Annotated[float, Field(gt=0)] = 64.0
    num_cpus: Amount = 0
    port: Port = 0
    flags: dict[str, FlagValue] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_flags(self.flags)
        if twice := {key.replace("-", "_") for key in self.flags} & set(type(self).model_fields):
            raise ValueError(f"flags: {min(twice)} has a key of its own")
        return self

    @property
    def bundle(self) -> dict[str, float]:
        cpus = {"CPU": float(self.num_cpus)} if self.num_cpus else {}
        return {**cpus, "memory": float(self.memory_mib * _MIB)}


class Restart(_Part):
    """A process that dies starts again after `backoff_s`, twice that, and so on up to
    `max_backoff_s`. After `failures` in a row it is given up; 0 is never. One that lived for
    `stable_s` begins anew."""

    failures: Annotated[int, Field(ge=0)] = 8
    backoff_s: Seconds = 0.5
    max_backoff_s: Seconds = 30.0
    stable_s: Seconds = 60.0


class Scale(_Part):
    """How long the planner must want more, or fewer, workers until it gets its way."""

    look_s: Seconds = 5.0
    up_after_s: Seconds = 10.0
    down_after_s: Seconds = 300.0


class Timeouts(_Part):
    """`place_s`: until all have their place; `start_s`: then until ready, with the weights."""

    place_s: Seconds = 300.0
    start_s: Seconds = 1800.0
    drain_s: Annotated[float, Field(ge=0)] = 30.0


class ClusterConfig(_Part):
    model: str = ""
    model_name: str = ""
    redis: str = ""
    cluster_name: Name = "default"
    env: dict[str, str] = Field(default_factory=dict)
    tls: Tls | None = None
    engine: Engine = Field(default_factory=Engine)
    conductors: Conductors = Field(default_factory=Conductors)
    pools: dict[Name, Pool]
    store: Store | None = None
    restart: Restart = Field(default_factory=Restart)
    scale: Scale = Field(default_factory=Scale)
    timeouts: Timeouts = Field(default_factory=Timeouts)

    @model_validator(mode="before")
    @classmethod
    def _name_roles(cls, values: Any) -> Any:
        pools = values.get("pools") if isinstance(values, dict) else None
        if not isinstance(pools, dict):
            return values
        named = {
            name: {"role": name, **pool}
            if isinstance(pool, dict) and name in ("prefill", "decode", "elastic")
            else pool
            for name, pool in pools.items()
        }
        return {**values, "pools": named}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(pool.role != "prefill" and pool.most for pool in self.pools.values()):
            raise ValueError("pools: nobody would decode; add a pool of decode or elastic workers")
        for role in ("prefill", "decode", "elastic"):
            scaling = [n for n, p in self.pools.items() if p.role == role and p.scales]
            if len(scaling) > 1:
                raise ValueError(
                    f"pools: {' and '.join(scaling)} are both {role} pools that scale; the planner "
                    "says one number for each role, so only one of them can follow it"
                )
        if self.pools_of("elastic") and any(p.scales for p in self.pools_of("prefill", "decode")):
            raise ValueError("pools: beside an elastic pool, only that one can scale")
        return self

    def pools_of(self, *roles: str) -> list[Pool]:
        return [pool for pool in self.pools.values() if pool.role in roles]

    @property
    def scales(self) -> bool:
        return any(pool.scales for pool in self.pools.values())

    @property
    def elastic(self) -> bool:
        return bool(self.pools_of("elastic"))


def load_config(path: Path, environ: Mapping[str, str]) -> ClusterConfig:
    """Read `cluster.yaml`. BATON_REDIS takes the place of `redis`: it may have a password.

    Raises ConfigError.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    config = parse_config(content, str(path))
    if redis := environ.get("BATON_REDIS"):
        config = config.model_copy(update={"redis": redis})
    if config.conductors.replicas > 1 and not config.redis:
        raise ConfigError(
            f"{path}: several conductors share requests through Redis: give its URL as `redis` or "
            "in BATON_REDIS, or leave conductors.replicas at 1"
        )
    return config


def parse_config(content: object, source: str) -> ClusterConfig:
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must hold `key: value` lines, with `pools` among them")
    try:
        return ClusterConfig.model_validate(content)
    except ValidationError as error:
        lines = [f"{source}: {_say(dict(each))}" for each in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _say(error: dict[str, Any]) -> str:
    # A union of types adds its own parts to the path; they are no keys of the file.
    keys = [str(part) for part in error["loc"] if part not in _UNION_PARTS]
    where = ".".join(keys)
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(keys[-1], list(_known_keys()), n=1, cutoff=0.6)
        return f"unknown key {where}" + (f"; did you mean {close[0]}?" if close else "")
    if error["type"] == "missing":
        return f"{where} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


_UNION_PARTS = {"bool", "int", "float", "str", "list[str]", "[key]"}


def _known_keys() -> Iterator[str]:
    for part in (ClusterConfig, Tls, Engine, Conductors, Pool, Store, Restart, Scale, Timeouts):
        yield from part.model_fields
