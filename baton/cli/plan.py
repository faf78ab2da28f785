"""Which processes `baton serve` starts: their command lines, CPUs and environment."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from baton.child import ChildSpec
from baton.cli.serve_options import ServeOptions
from baton.cli.supervisor import Addresses, ClusterPlan
from baton.cpus import available_cpus, format_cpus, parse_cpus, share_cpus
from baton.errors import ConfigError
from baton.gpus import VISIBLE, share_gpus, visible_gpus

_CONDUCTOR_FLAGS = (
    "policy",
    "local_prefill_tokens",
    "prompt_patience",
    "slo_ttft_ms",
    "slo_tpot_ms",
    "elastic_settle",
    "otlp_endpoint",
    "trace_sample",
    "keys",
    "tenants",
)


def make_plan(options: ServeOptions, model: Path, environ: dict[str, str]) -> ClusterPlan:
    """The command lines of every process. Raises ConfigError."""
    environ = with_certificates(environ, options)
    has_tls = bool(options.tls_cert or options.ssl_certfile)  # workers have a port of their own
    placed = place_workers(options, available_cpus())
    conductor_cpus = place_conductor(placed)
    common = ("--model", str(model), "--model-name", options.served_name, "--exit-with-parent")

    def conductor(number: int, listening: Addresses | None) -> ChildSpec:
        http_port = _port(listening.http) if listening else _nth_port(options.port, number)
        grpc_port = _port(listening.grpc) if listening else _nth_port(options.grpc_port, number)
        internal_port = _port(listening.for_workers) if listening and has_tls else 0
        return ChildSpec(
            f"conductor-{number}" if options.conductors > 1 else "conductor",
            _python(
                *("conductor", "--name", f"conductor-{number}", "--host", options.host),
                *("--port", str(http_port), "--grpc-port", str(grpc_port), "--announce", *common),
                *(("--internal-port", str(internal_port)) if has_tls else ()),
                *(("--cpus", conductor_cpus) if conductor_cpus else ()),
                *(text for name in _CONDUCTOR_FLAGS for text in _flag(options, name)),
                *(("--no-kv-fetch",) if not options.kv_fetch else ()),
                *(("--elastic",) if options.elastic else ()),
                *("--drain-timeout", str(options.drain_timeout)),
            ),
            environ,
        )

    # Fixed, so that workers find the store again when it was started anew.
    store_at = f"127.0.0.1:{_free_port()}" if options.store_memory_mib else ""

    def store(addresses: Addresses) -> ChildSpec:
        memory = f"store-0-{_port(addresses.http)}"  # other clusters of this machine have theirs
        return ChildSpec(
            "store-0",
            _python(
                *("kvstore", "--name", "store-0", "--conductor", addresses.all_for_workers),
                *("--memory-name", memory),
                *("--listen", store_at, "--no-keep-memory", *common, *_store_flags(options)),
                *("--metrics-port", str(_nth_port(options.metrics_port, len(placed)))),
                *_flag(options, "metrics_tls"),
            ),
            environ,
        )

    def workers(addresses: Addresses) -> Sequence[ChildSpec]:
        flags = tuple(_worker_flags(options))
        on = place_on_devices(options, environ, len(placed))
        if store_at:
            flags = (*flags, "--store", store_at)
        return [store(addresses)] * bool(store_at) + [
            ChildSpec(
                name,
                _python(
                    *_module(options, role),
                    *("--name", name, "--conductor", addresses.all_for_workers),
                    *("--listen", "127.0.0.1:0", "--cpus", cpus, *common, *flags),
                    *("--memory-share", f"{on[number][1]:.4f}"),
                    *("--metrics-port", str(_nth_port(options.metrics_port, number))),
                    *_flag(options, "metrics_tls"),
                ),
                environ | on[number][0],
            )
            for number, (role, name, cpus) in enumerate(placed)
        ]

    first, *more = [partial(conductor, number) for number in range(options.conductors)]
    return ClusterPlan(
        first, workers, options.start_timeout, options.drain_timeout, more, options.ssl_certfile
    )


def _module(options: ServeOptions, role: str) -> tuple[str, ...]:
    return ("elastic_worker", "--role", role) if options.elastic else (f"{role}_worker",)


def place_workers(options: ServeOptions, cpus: Sequence[int]) -> list[tuple[str, str, str]]:
    """Role, name and CPUs of every worker. Roles without CPUs of their own divide those that are
    left, or all when none is. Raises ConfigError."""
    given = {"prefill": options.prefill_cpus, "decode": options.decode_cpus}
    own = {role: parse_cpus(text) for role, text in given.items() if text is not None}
    taken = {cpu for part in own.values() for cpu in part}
    if foreign := taken - set(cpus):
        raise ConfigError(
            f"CPU {format_cpus(sorted(foreign))} cannot be used here; there are {format_cpus(cpus)}"
        )
    counts = {"prefill": options.prefill_workers, "decode": options.decode}
    rest = [cpu for cpu in cpus if cpu not in taken] or cpus
    shared = iter(share_cpus(rest, sum(n for role, n in counts.items() if role not in own)))
    placed: list[tuple[str, str, str]] = []
    for role, count in counts.items():
        parts = share_cpus(own[role], count) if role in own else itertools.islice(shared, count)
        for number, part in enumerate(parts):
            # What can change its role has none in its name.
            name = f"worker-{len(placed)}" if options.elastic else f"{role}-{number}"
            placed.append((role, name, format_cpus(part)))
    return placed


def place_conductor(placed: Sequence[tuple[str, str, str]]) -> str:
    """CPUs of the conductor: those where only prefill workers compute. They wait between prompts,
    while what the conductor takes from a decode worker delays every stream. Empty: there are none,
    so all of them."""
    used = {
        role: {cpu for owner, _, cpus in placed if owner == role for cpu in parse_cpus(cpus)}
        for role in ("prefill", "decode")
    }
    return format_cpus(sorted(used["prefill"] - used["decode"]))


def place_on_devices(
    options: ServeOptions, environ: Mapping[str, str], workers: int
) -> list[tuple[dict[str, str], float]]:
    """For each worker: what its environment says of GPUs, and its share of its device's memory.
    Several GPUs are dealt to the workers in turn."""
    gpus = visible_gpus(environ) if options.device in ("auto", "cuda") else []
    if len(gpus) < 2:
        return [({}, 1 / workers)] * workers
    return [({VISIBLE: gpu}, share) for gpu, share in share_gpus(gpus, workers)]


def _worker_flags(options: ServeOptions) -> Iterator[str]:
    yield from ("--device", options.device, "--dtype", options.dtype)
    yield from ("--transport", options.transport)
    for name in ("block_size", "num_blocks", "kv_memory_mib", "max_num_seqs", "max_batch_tokens"):
        yield from _flag(options, name)
    for name in ("max_model_len", "kernels", "threads", "verify"):
        yield from _flag(options, name)
    if not options.prefix_caching:
        yield "--no-prefix-caching"


def _store_flags(options: ServeOptions) -> Iterator[str]:
    yield from ("--memory-mib", str(options.store_memory_mib), "--dtype", options.dtype)
    yield from ("--transport", options.transport)
    for name, flag in (("store_dir", "--disk-dir"), ("store_gib", "--disk-gib")):
        if getattr(options, name) is not None:
            yield from (flag, str(getattr(options, name)))
    for name in ("block_size", "verify"):
        yield from _flag(options, name)


def _flag(options: ServeOptions, name: str) -> Iterator[str]:
    value = getattr(options, name)
    if value is not None:
        yield from (f"--{name.replace('_', '-')}", str(value))


def new_environ(redis: str = "") -> dict[str, str]:
    """The environment of a cluster's processes: ours, a token of its own, and the Redis that its
    conductors share."""
    environ = dict(os.environ)
    environ.pop("BATON_REDIS", None)
    if redis:  # not as a flag, which others on this machine could read: it may have a password
        environ["BATON_REDIS"] = redis
        environ.setdefault("BATON_CLUSTER_NAME", f"serve-{secrets.token_hex(4)}")
    # Whoever knows this token may speak for a worker; it lives as long as this cluster.
    environ.setdefault("BATON_CLUSTER_TOKEN", secrets.token_urlsafe(32))
    environ["PYTHONUNBUFFERED"] = "1"
    # Weights and activations in huge pages: CPU steps take a tenth less time (Linux, glibc 2.35).
    environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return environ


def with_certificates(environ: dict[str, str], options: ServeOptions) -> dict[str, str]:
    """`environ` with the files that the options name, and no others: the supervisor has to know."""
    names = ("ssl_certfile", "ssl_keyfile", "tls_cert", "tls_key", "tls_ca")
    files = {f"BATON_{name.upper()}": str(getattr(options, name)) for name in names}
    kept = {name: value for name, value in environ.items() if name not in files}
    return kept | {name: path for name, path in files.items() if path}


def _python(module: str, *flags: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *flags)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _nth_port(first: int, number: int) -> int:
    return first + number if first else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
