"""How each process of the cluster is started: the arguments of `python -m`, for a given node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from baton.ray.config import ClusterConfig, FlagValue, Needs, Store
from baton.ray.place import Command, Node

_MODULES = {"prefill": "prefill_worker", "decode": "decode_worker", "elastic": "elastic_worker"}


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a conductor listens, as `host:port` that every node can reach."""

    http: str
    grpc: str
    for_workers: str = ""  # empty: at `grpc`
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.http}"


def conductor_command(
    config: ClusterConfig, number: int, node: Node, known: Listening | None
) -> Command:
    """`known`: where it listened before, on the same node; it should be found there again."""
    part = config.conductors
    port, grpc_port = (p + number if p else 0 for p in (part.port, part.grpc_port))
    if known is not None:
        port, grpc_port = (_port_of(address) for address in (known.http, known.grpc))
    name = conductor_name(number)
    at = known.for_workers if known is not None else ""
    args = (
        *("conductor", "--name", name, "--host", "0.0.0.0", "--advertise", node.ip),
        *("--port", str(port), "--grpc-port", str(grpc_port), "--announce"),
        *(("--internal-port", str(_port_of(at))) if at else ()),
        *_common(config),
        *(("--elastic",) if config.elastic else ()),
        *(("--advise",) if config.scales else ()),
        *flags_of(part.flags),
    )
    return Command(name, args, {**config.env, **part.env})


def worker_command(
    config: ClusterConfig,
    pool_name: str,
    number: int,
    node: Node,
    conductors: Sequence[Listening],
    store: str,
) -> Command:
    """`store`: `host:port` of the node's store, or empty."""
    pool = config.pools[pool_name]
    name = worker_name(pool_name, number)
    # Elastic workers begin in turns: one that decodes is needed first.
    role = ("--role", ("decode", "prefill")[number % 2]) if pool.role == "elastic" else ()
    args = (
        *(_MODULES[pool.role], *role, "--name", name, "--listen", "0.0.0.0:0"),
        *_member(config, node, conductors),
        *(("--store", store) if store else ()),
        *_shared_gpu(pool),
        *flags_of(pool.flags),
    )
    return Command(name, args, {**config.env, **pool.env})


def store_command(
    config: ClusterConfig, store: Store, node: Node, port: int, conductors: Sequence[Listening]
) -> Command:
    name = f"store-{node.name}"
    disk = ("--disk-dir", store.disk_dir, "--disk-gib", f"{store.disk_gib:g}")
    memory = ("--memory-mib", str(store.memory_mib))
    args = (
        *("kvstore", "--name", name, "--listen", f"0.0.0.0:{port}"),
        # Of its files: several clusters, or nodes in tests, may share a machine's /dev/shm.
        *("--memory-name", f"{config.cluster_name}-{node.name}"),
        # They would be found again only in the same Ray cluster; a crash leaves them in any case.
        *("--no-keep-memory", *memory, *(disk if store.disk_dir else ())),
        *_member(config, node, conductors),
        *flags_of(store.flags),
    )
    return Command(name, args, {**config.env, **store.env})


def conductor_name(number: int) -> str:
    return f"conductor-{number}"


def worker_name(pool: str, number: int) -> str:
    return f"{pool}-{number}"


def flags_of(flags: Mapping[str, FlagValue]) -> Iterator[str]:
    """Command line flags: `block_size: 64` is --block-size 64, `prefix_caching: false`
    --no-prefix-caching."""
    for key, value in flags.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
            continue
        for each in value if isinstance(value, list) else [value]:
            yield from (f"--{name}", str(each))


def _common(config: ClusterConfig) -> Iterator[str]:
    """Of every process."""
    yield "--exit-with-parent"
    yield from ("--drain-timeout", f"{config.timeouts.drain_s:g}")
    for flag, value in (("--model", config.model), ("--model-name", config.model_name)):
        if value:
            yield from (flag, value)
    if config.tls is not None:
        yield from flags_of({f"tls_{key}": value for key, value in config.tls if value})
    if config.redis:  # its URL is in the environment: it may have a password
        yield from ("--cluster-name", config.cluster_name)


def _member(config: ClusterConfig, node: Node, conductors: Sequence[Listening]) -> Iterator[str]:
    """Of workers and stores. With Redis they find conductors there."""
    yield from ("--node", node.name, "--advertise", node.ip)
    if not config.redis:
        yield from ("--conductor", ",".join(each.for_workers or each.grpc for each in conductors))
    yield from flags_of(config.engine.flags)
    yield from _common(config)


def _shared_gpu(pool: Needs) -> tuple[str, ...]:
    """Who has a part of a GPU counts on that part of its memory."""
    shares = 0 < pool.num_gpus < 1 and not {"memory_share", "memory-share"} & set(pool.flags)
    return ("--memory-share", f"{pool.num_gpus:.4f}") if shares else ()


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])
