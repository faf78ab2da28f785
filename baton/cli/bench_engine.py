"""`baton bench engine`: one engine on this machine, next to what the machine could do."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from baton.bench.engine_options import PARTS, Options
from baton.bench.origin import origin
from baton.cli.bench import JsonFile, write_json
from baton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BenchEngineOptions:
    """The flags of `baton bench engine`."""

    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Directory or hub id; else the demo.")
    ] = None
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights instead: tiny, small, qwen3-0.6b, qwen3-8b."),
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto"
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = one per CPU.")] = 0
    kernels: Annotated[str, typer.Option(help="auto, native, reference, triton or flash.")] = "auto"
    block_size: Annotated[int, typer.Option(help="Tokens of a KV block.")] = 32
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step.")] = 2048
    prompts: Annotated[
        str, typer.Option(metavar="N,N", help="Lengths of prompts to measure, by commas.")
    ] = ""
    decodes: Annotated[
        str,
        typer.Option(metavar="NxT,NxT", help="Decodes to measure: N sequences of T tokens each."),
    ] = ""
    only: Annotated[
        str, typer.Option(help="Some of prefill, decode, loop, kernels, profile, by commas.")
    ] = "prefill,decode,loop,kernels"
    profile: Annotated[
        bool, typer.Option("--profile", help="Also profile steps: where the rest goes.")
    ] = False
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, seconds: whether everything runs.")
    ] = False
    json: JsonFile = None


def bench_engine(options: BenchEngineOptions) -> None:
    """Prefill, decode and every kernel of one engine, next to this machine's ceilings."""
    from baton.bench import engine, engine_text  # torch: only this command needs it

    console = Console(stderr=True)
    with console.status("starting") as status:
        report = engine.run(_options(options), status.update)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow")
    if options.json is not None:
        write_json(
            origin("engine", "baton", *sys.argv[1:]) | engine_text.as_json(report), options.json
        )
    if options.json != "-":
        for table in engine_text.tables(report):
            _print(table.title, table.header, table.rows)


def _options(options: BenchEngineOptions) -> Options:
    parts = [part.strip() for part in options.only.split(",")]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"--only takes some of {', '.join(PARTS)} by commas, not {unknown[0]!r}")
    return Options(
        model=options.model,
        shape=options.shape,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        kernels=options.kernels,
        block_size=options.block_size,
        step_tokens=options.max_batch_tokens,
        prompts=tuple(tokens for (tokens,) in _points("--prompts", options.prompts, 1)),
        decodes=tuple((n, tokens) for n, tokens in _points("--decodes", options.decodes, 2)),
        quick=options.quick,
        parts=(*parts, "profile") if options.profile else tuple(parts),
    )


def _points(flag: str, text: str, sizes: int) -> Iterator[tuple[int, ...]]:
    """Each of so many sizes joined by x, separated by commas. Raises ConfigError."""
    for point in filter(None, text.split(",")):
        parts = point.strip().split("x")
        if len(parts) != sizes or not all(part.isdecimal() and int(part) for part in parts):
            raise ConfigError(f"{flag} takes {'x'.join('N' * sizes)} by commas, not {point!r}")
        yield tuple(map(int, parts))


def _print(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table, "")
