"""`baton bench handoff`: a transport next to a memory copy, and what of it clients wait for."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from baton.bench.exposed import Exposure, measure
from baton.bench.exposed import table as exposure_table
from baton.cli.bench import CLUSTER, JsonFile, progress_bar, with_cluster, write_json
from baton.cli.options import CaFile, api_key
from baton.cli.serve_options import ServeOptions
from baton.client.trust import trusted
from baton.errors import ConfigError

_TRANSPORTS = ("nixl", "nccl", "shm")


@dataclass(frozen=True, slots=True)
class BenchHandoffOptions:
    """The flags of `baton bench handoff`."""

    transport: Annotated[str, typer.Option(help="nixl, nccl, shm; several by commas.")] = "nixl,shm"
    total_mib: Annotated[int, typer.Option(min=1, help="MiB of KV in each round.")] = 256
    block_kib: Annotated[str, typer.Option(help="Block sizes, KiB, by commas.")] = "64,256,1024"
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; rates are their medians.")] = 7
    exposed: Annotated[
        bool, typer.Option(help="Also measure what prefill does not hide, in a real cluster.")
    ] = True
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="That cluster; else 1P1D is started."),
    ] = None
    ca_file: CaFile = ""
    input_tokens: Annotated[str, typer.Option(help="Its prompts, tokens, by commas.")] = (
        "256,1024,3072"
    )
    requests: Annotated[int, typer.Option(min=1, help="Of each prompt length.")] = 15
    vocab_size: Annotated[int, typer.Option(min=2, help="Prompts use ids below this.")] = 1000
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id.", rich_help_panel=CLUSTER)
    ] = None
    dtype: Annotated[str, typer.Option(rich_help_panel=CLUSTER)] = "auto"
    json: JsonFile = None


def bench_handoff(options: BenchHandoffOptions) -> None:
    """Read KV from another process, next to a plain copy of the same blocks."""
    from baton.bench import handoff  # gRPC and numpy: only this command needs them

    tls = trusted(options.ca_file)
    transports = _transports(options.transport)
    sizes = _numbers(options.block_kib, "--block-kib")
    lengths = _numbers(options.input_tokens, "--input-tokens")
    with progress_bar() as bar:
        report = handoff.run(
            transports, options.total_mib, sizes, options.rounds, _on(bar, "transports")
        )
    exposures = asyncio.run(_exposures(options, lengths, tls)) if options.exposed else ()
    if options.json is not None:
        write_json(handoff.as_json(report, exposures, sys.argv[1:]), options.json)
    if options.json != "-":
        console = Console()
        console.print(handoff.table(report))
        if exposures:
            console.print(exposure_table(exposures))


async def _exposures(
    options: BenchHandoffOptions, lengths: list[int], tls: ssl.SSLContext | None
) -> tuple[Exposure, ...]:
    async def of(url: str, tls: ssl.SSLContext | None = None) -> tuple[Exposure, ...]:
        with progress_bar() as bar:
            on_progress = _on(bar, "cluster")
            count, vocabulary = options.requests, options.vocab_size
            return await measure(url, lengths, count, vocabulary, on_progress, api_key(), tls)

    if options.url is not None:
        return await of(options.url, tls)
    cluster = ServeOptions(
        model=options.model,
        port=0,
        grpc_port=0,
        dtype=options.dtype,
        # One transport is what a cluster runs with; the first is the one that was asked for.
        transport=options.transport.split(",")[0].strip(),
    )
    return await with_cluster(cluster, of)


def _on(bar: Progress, description: str) -> Callable[[int, int], None]:
    task = bar.add_task(description, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _transports(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in _TRANSPORTS:
            raise ConfigError(
                f"--transport takes some of {', '.join(_TRANSPORTS)} by commas, not {name!r}"
            )
    return names


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} takes whole numbers by commas, not {text!r}") from None
