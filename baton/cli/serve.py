"""`baton serve`: a whole cluster on this machine."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from baton.cli.child import ChildSpec
from baton.cli.generate import print_answer
from baton.cli.options import connect
from baton.cli.report import Reporter
from baton.cli.supervisor import Addresses, ClusterPlan, Supervisor
from baton.client.http import Prompt
from baton.cpus import available_cpus, format_cpus, parse_cpus, share_cpus
from baton.errors import ConfigError
from baton.model.hub import resolve_model
from baton.model.spec import load_spec

_ENGINE = "Engine (default: chosen by the workers)"
_STORE = "Routing and KV cache"
_CONDUCTOR_FLAGS = ("policy", "local_prefill_tokens", "slo_ttft_ms", "slo_tpot_ms")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The flags of `baton serve`. Engine flags that are None are left to the workers."""

    model: Annotated[
        str | None,
        typer.Argument(help="Directory or hub id; the built-in demo model when left out."),
    ] = None
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 1
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 1
    colocated: Annotated[
        bool, typer.Option("--colocated", help="Decode workers only; each also does prefill.")
    ] = False
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP; 0 = any free port.")] = 8000
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC; 0 = any.")] = 50051
    conductors: Annotated[
        int, typer.Option(min=1, help="Conductors, on ports in a row from the given ones.")
    ] = 1
    redis: Annotated[
        str,
        typer.Option(
            envvar="BATON_REDIS",
            metavar="URL",
            help="Where conductors find each other's requests: when one dies, others go on.",
        ),
    ] = ""
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto"
    model_name: Annotated[
        str | None, typer.Option(help="Served name; the model's last part when left out.")
    ] = None
    transport: Annotated[str, typer.Option(help="auto, nixl, nccl or shm.")] = "auto"
    try_text: Annotated[
        str | None,
        typer.Option("--try", metavar="TEXT", help="Answer TEXT once ready, then keep serving."),
    ] = None
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds until ready.")] = 600.0
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get on Ctrl-C.")
    ] = 30.0
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every process's log.")] = False
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object per line on standard output.")
    ] = False
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of a KV block.", rich_help_panel=_ENGINE)
    ] = None
    num_blocks: Annotated[
        int | None, typer.Option(help="KV blocks of a worker.", rich_help_panel=_ENGINE)
    ] = None
    kv_memory_mib: Annotated[
        int | None,
        typer.Option(
            help="KV memory of a worker, MiB; left out: from what is free.", rich_help_panel=_ENGINE
        ),
    ] = None
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences of one step.", rich_help_panel=_ENGINE)
    ] = None
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one step.", rich_help_panel=_ENGINE)
    ] = None
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt and answer, tokens.", rich_help_panel=_ENGINE)
    ] = None
    kernels: Annotated[
        str | None,
        typer.Option(
            help="What computes: auto, native, reference, triton, flash.", rich_help_panel=_ENGINE
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of a worker.", rich_help_panel=_ENGINE),
    ] = None
    prefill_cpus: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="CPUs that the prefill workers divide, as 0-3,8.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    decode_cpus: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="CPUs that the decode workers divide. Without either, all workers get a part.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    verify: Annotated[
        str | None,
        typer.Option(help="Digests of handed-over KV: off, sample, full.", rich_help_panel=_ENGINE),
    ] = None
    prefix_caching: Annotated[
        bool,
        typer.Option(help="Reuse the KV of common prefixes.", rich_help_panel=_STORE),
    ] = True
    policy: Annotated[
        str | None,
        typer.Option(
            help="Routing: cache-aware, consistent-hash, least-loaded, round-robin, random.",
            rich_help_panel=_STORE,
        ),
    ] = None
    kv_fetch: Annotated[
        bool,
        typer.Option(
            help="Let workers fetch what others and the store hold of a prefix.",
            rich_help_panel=_STORE,
        ),
    ] = True
    local_prefill_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Prompts up to this length skip the prefill worker; 0: none.",
            rich_help_panel=_STORE,
        ),
    ] = None
    slo_ttft_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Refuse what would miss this TTFT.", rich_help_panel=_STORE),
    ] = None
    slo_tpot_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Refuse what would miss this TPOT.", rich_help_panel=_STORE),
    ] = None
    store_memory_mib: Annotated[
        int,
        typer.Option(min=0, help="KV store in shared memory; 0: no store.", rich_help_panel=_STORE),
    ] = 0
    store_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The store's NVMe tier.", rich_help_panel=_STORE),
    ] = None
    store_gib: Annotated[
        float | None,
        typer.Option(help="Space that the NVMe tier may take.", rich_help_panel=_STORE),
    ] = None

    @property
    def prefill_workers(self) -> int:
        return 0 if self.colocated else self.prefill

    @property
    def served_name(self) -> str:
        if self.model_name is not None:
            return self.model_name
        return "demo" if self.model is None else Path(self.model).resolve().name


# The same answer every time; the penalty keeps a tiny model from saying one line over and over.
_TRY_OPTIONS = {"temperature": 0.0, "repetition_penalty": 1.2}


def serve(options: ServeOptions) -> None:
    """Run a whole cluster on this machine until Ctrl-C."""
    asyncio.run(_serve(options))


async def _serve(options: ServeOptions) -> None:
    if options.prefill == 0 and not options.colocated:
        raise ConfigError("--prefill 0 leaves nobody to prefill: give at least 1, or --colocated")
    if options.port == options.grpc_port != 0:
        raise ConfigError(
            f"--port and --grpc-port are both {options.port}: give HTTP and gRPC a port each"
        )
    for port, flag in ((options.port, "--port"), (options.grpc_port, "--grpc-port")):
        for number in range(options.conductors if port else 0):
            _check_free(options.host, port + number, flag)
    if not options.store_memory_mib and (options.store_dir or options.store_gib):
        raise ConfigError("--store-dir is for a store: give it --store-memory-mib too")
    with Reporter(options.json, options.verbose) as reporter:
        model = await find_model(options, reporter)
        plan = make_plan(options, model, new_environ(options.redis))
        supervisor = Supervisor(plan, reporter)

        async def when_ready(addresses: Addresses) -> None:
            reporter.settle()
            if options.try_text is not None and not options.json:
                async with connect(addresses.url) as client:
                    prompt = Prompt(options.try_text, max_tokens=96, options=_TRY_OPTIONS)
                    await print_answer(client, prompt, timing=True, echo=True)
            _say_ready(options, reporter, addresses)

        await supervisor.run(when_ready)


async def find_model(options: ServeOptions, reporter: Reporter) -> Path:
    """Find (or download) the model and read its config before any process is started."""
    reporter.step("model", f"looking for {options.model or 'the demo model'}")
    model = await asyncio.to_thread(resolve_model, options.model)
    await asyncio.to_thread(load_spec, model)
    reporter.step("model", options.served_name, done=True)
    return model


def _say_ready(options: ServeOptions, reporter: Reporter, addresses: Addresses) -> None:
    split = f"{options.prefill_workers}P{options.decode}D"
    shape = f"{options.decode} co-located" if options.colocated else split
    reporter.result(
        "ready",
        f"ready  {addresses.urls}  grpc {addresses.grpcs}  {options.served_name} {shape}  "
        "Ctrl-C stops",
        http=addresses.http,
        grpc=addresses.grpc,
        url=addresses.url,
        urls=addresses.urls,
        model=options.served_name,
        pid=os.getpid(),
    )


def make_plan(options: ServeOptions, model: Path, environ: dict[str, str]) -> ClusterPlan:
    """The command lines of every process. Raises ConfigError."""
    placed = place_workers(options, available_cpus())
    conductor_cpus = place_conductor(placed)
    common = ("--model", str(model), "--model-name", options.served_name, "--exit-with-parent")

    def conductor(number: int, listening: Addresses | None) -> ChildSpec:
        http_port = _port(listening.http) if listening else _nth_port(options.port, number)
        grpc_port = _port(listening.grpc) if listening else _nth_port(options.grpc_port, number)
        return ChildSpec(
            f"conductor-{number}" if options.conductors > 1 else "conductor",
            _python(
                *("conductor", "--name", f"conductor-{number}", "--host", options.host),
                *("--port", str(http_port), "--grpc-port", str(grpc_port), "--announce", *common),
                *(("--cpus", conductor_cpus) if conductor_cpus else ()),
                *(text for name in _CONDUCTOR_FLAGS for text in _flag(options, name)),
                *(("--no-kv-fetch",) if not options.kv_fetch else ()),
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
                *("kvstore", "--name", "store-0", "--conductor", addresses.grpcs),
                *("--memory-name", memory),
                *("--listen", store_at, "--no-keep-memory", *common, *_store_flags(options)),
            ),
            environ,
        )

    def workers(addresses: Addresses) -> Sequence[ChildSpec]:
        flags = tuple(_worker_flags(options, len(placed)))
        if store_at:
            flags = (*flags, "--store", store_at)
        return [store(addresses)] * bool(store_at) + [
            ChildSpec(
                name,
                _python(
                    *(f"{role}_worker", "--name", name, "--conductor", addresses.grpcs),
                    *("--listen", "127.0.0.1:0", "--cpus", cpus, *common, *flags),
                ),
                environ,
            )
            for role, name, cpus in placed
        ]

    first, *more = [partial(conductor, number) for number in range(options.conductors)]
    return ClusterPlan(first, workers, options.start_timeout, options.drain_timeout, more)


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
    placed = []
    for role, count in counts.items():
        parts = share_cpus(own[role], count) if role in own else itertools.islice(shared, count)
        for number, part in enumerate(parts):
            placed.append((role, f"{role}-{number}", format_cpus(part)))
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


def _worker_flags(options: ServeOptions, workers: int) -> Iterator[str]:
    yield from ("--device", options.device, "--dtype", options.dtype)
    yield from ("--transport", options.transport, "--memory-share", f"{1 / workers:.4f}")
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


def _check_free(host: str, port: int, flag: str) -> None:
    """Raise ConfigError when the port is taken: sooner and clearer than the conductor could, and
    gRPC would even share it with another cluster."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                message = f"is in use; choose another with {flag} (0 = any free port)"
            elif error.errno == errno.EACCES:
                message = f"cannot be used: {reason}; choose another with {flag} (above 1023)"
            else:
                message = f"cannot be used: {reason}; choose an address of this machine with --host"
            raise ConfigError(f"{host}:{port} {message}") from error
