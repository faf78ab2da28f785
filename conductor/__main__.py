"""`python -m conductor`: one conductor process."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import orjson

from baton.config import parse_config
from baton.cpus import bind, choose_placement
from baton.errors import BatonError
from baton.logs import setup_logging
from baton.model.spec import load_spec, resolve_model
from baton.tokenizer import load_tokenizer
from baton.worker.lifecycle import watch_parent
from conductor.cluster import ConductorIdentity
from conductor.config import ConductorConfig
from conductor.server import Server
from conductor.service import ServedModel

log = logging.getLogger("conductor")


def main() -> int:
    try:
        config = parse_config(ConductorConfig, sys.argv[1:], os.environ, "python -m conductor")
        setup_logging(config.log_level, config.name)
        if config.cpus:
            bind(choose_placement(config.cpus, threads=0).cpus)
        if config.exit_with_parent:
            watch_parent()
        model = load_model(config)
        spare_what_is_loaded()
        asyncio.run(_serve(config, model))
    except BatonError as error:
        sys.stderr.write(f"conductor: {error.message}\n")
        return 2
    return 0


def spare_what_is_loaded() -> None:
    """Keep the garbage collector from looking through what stays anyway: it would hold every stream
    up for 50 ms, again and again. What requests leave behind goes by its reference counts, so it
    need not look for that often, either."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def load_model(config: ConductorConfig) -> ServedModel:
    """Tokenizer and limits of the model. Raises ModelLoadError."""
    path = resolve_model(config.model or None)
    spec = load_spec(path)
    return ServedModel(
        name=config.model_name or _default_name(config.model),
        tokenizer=load_tokenizer(path),
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_model_len,
        eos_ids=spec.eos_token_ids,
        fingerprint=spec.fingerprint,
    )


def _default_name(model: str) -> str:
    return Path(model).name if model else "demo"


async def _serve(config: ConductorConfig, model: ServedModel) -> None:
    server = Server(config, model, os.environ.get("BATON_CLUSTER_TOKEN", ""))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, _on_signal, server, number)

    def on_listening(identity: ConductorIdentity) -> None:
        log.info("listening http=%s grpc=%s", identity.http, identity.grpc)
        if config.announce:
            _announce(identity)

    await server.run(on_listening)


def _on_signal(server: Server, number: signal.Signals) -> None:
    """The first SIGINT or SIGTERM drains; a second one, or SIGHUP (our parent has gone), does not
    wait for running requests."""
    at_once = number is signal.SIGHUP or server.stopping
    server.stop(drain_s=0.0 if at_once else None)


def _announce(identity: ConductorIdentity) -> None:
    event = {
        "event": "listening",
        "http": identity.http,
        "grpc": identity.grpc,
        "for_workers": identity.for_workers,
        "scheme": identity.scheme,
        "pid": identity.pid,
    }
    sys.stdout.buffer.write(orjson.dumps(event) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
