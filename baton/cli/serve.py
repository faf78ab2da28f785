"""`baton serve`: a whole cluster on this machine."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path

from baton.cli.generate import print_answer
from baton.cli.options import api_key
from baton.cli.plan import make_plan, new_environ
from baton.cli.report import Reporter
from baton.cli.serve_options import ServeOptions
from baton.cli.supervisor import Addresses, Supervisor
from baton.client.http import Client, Prompt
from baton.errors import ConfigError
from baton.model.hub import resolve_model
from baton.model.spec import load_spec

# The same answer every time; the penalty keeps a tiny model from saying one line over and over.
_TRY_OPTIONS = {"temperature": 0.0, "repetition_penalty": 1.2}


def serve(options: ServeOptions) -> None:
    """Run a whole cluster on this machine until Ctrl-C."""
    asyncio.run(_serve(options))


async def _serve(options: ServeOptions) -> None:
    _check(options)
    with Reporter(options.json, options.verbose) as reporter:
        model = await find_model(options, reporter)
        plan = make_plan(options, model, new_environ(options.redis))
        supervisor = Supervisor(plan, reporter)

        async def when_ready(addresses: Addresses) -> None:
            reporter.step("page", f"{addresses.url}/", done=True)
            reporter.settle()
            if options.try_text is not None and not options.json:
                prompt = Prompt(options.try_text, max_tokens=96, options=_TRY_OPTIONS)
                tls = plan.trusted()
                async with Client(addresses.url, api_key=api_key(), tls=tls) as client:
                    await print_answer(client, prompt, timing=True, echo=True)
            _say_ready(options, reporter, addresses)

        await supervisor.run(when_ready)


def _check(options: ServeOptions) -> None:
    """Raises ConfigError for what cannot work together, and for ports that are taken."""
    if options.prefill == 0 and not options.colocated:
        raise ConfigError("--prefill 0 leaves nobody to prefill: give at least 1, or --colocated")
    if options.elastic and (options.colocated or options.prefill + options.decode < 3):
        raise ConfigError(
            "--elastic moves workers between prefill and decode, and each keeps one: give it three "
            "or more, as --prefill 1 --decode 2, and not --colocated"
        )
    if options.port == options.grpc_port != 0:
        raise ConfigError(
            f"--port and --grpc-port are both {options.port}: give HTTP and gRPC a port each"
        )
    near = options.port and abs(options.port - options.grpc_port) < options.conductors
    if near and options.grpc_port:
        raise ConfigError(
            f"{options.conductors} conductors need as many ports in a row from --port "
            f"{options.port} and from --grpc-port {options.grpc_port}: move one of them"
        )
    if not options.store_memory_mib and (options.store_dir or options.store_gib):
        raise ConfigError("--store-dir is for a store: give it --store-memory-mib too")
    members = options.prefill_workers + options.decode + bool(options.store_memory_mib)
    for host, first, count, flag in (
        (options.host, options.port, options.conductors, "--port"),
        (options.host, options.grpc_port, options.conductors, "--grpc-port"),
        ("127.0.0.1", options.metrics_port, members, "--metrics-port"),
    ):
        for port in range(first, first + count) if first else ():
            _check_free(host, port, flag)


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


def _check_free(host: str, port: int, flag: str) -> None:
    """Raise ConfigError when the port is taken: sooner and clearer than the process could that
    listens there, and gRPC would even share it with another cluster."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                zero = "no metrics" if flag == "--metrics-port" else "any free port"
                message = f"is in use; choose another with {flag} (0 = {zero})"
            elif error.errno == errno.EACCES:
                message = f"cannot be used: {reason}; choose another with {flag} (above 1023)"
            else:
                message = f"cannot be used: {reason}; choose an address of this machine with --host"
            raise ConfigError(f"{host}:{port} {message}") from error
