"""`baton bench`: measure one part next to its limit."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from baton.bench.serve import LoadPlan, Run, as_json, measure, rows
from baton.bench.sessions import Shape, TraceScale
from baton.bench.stats import Slo
from baton.cli.options import CaFile, api_key
from baton.cli.plan import make_plan, new_environ
from baton.cli.report import Reporter
from baton.cli.serve import find_model
from baton.cli.serve_options import ServeOptions
from baton.cli.supervisor import Addresses, Supervisor
from baton.client.trust import trusted
from baton.errors import ConfigError

T = TypeVar("T")

# Shared prefix and turns of a workload, when nothing else is asked for.
_WORKLOADS = {"plain": (0, 1), "shared-prefix": (1024, 1), "multi-turn": (0, 5), "trace": (0, 1)}

LOCAL = "+local"  # after a policy: workers fetch no KV, what each holds itself is its cache
CLUSTER = "Own cluster (when no --url is given)"
JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the result there; - = stdout.")
]


@dataclass(frozen=True, slots=True)
class BenchServeOptions:
    """The flags of `baton bench serve`."""

    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="A running cluster; else one is started."),
    ] = None
    ca_file: CaFile = ""
    workload: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="plain; shared-prefix; multi-turn: conversations; trace:FILE: a recorded one.",
        ),
    ] = "plain"
    requests: Annotated[int, typer.Option(min=1, help="Measured requests.")] = 64
    concurrency: Annotated[int, typer.Option(min=1, help="Closed loop: at once.")] = 8
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Open loop: requests/s, Poisson arrivals.")
    ] = None
    input_tokens: Annotated[int, typer.Option(min=1, help="Prompt length, tokens.")] = 256
    output_tokens: Annotated[int, typer.Option(min=1, help="Answer length, tokens.")] = 64
    shared_prefix: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens that prompts begin with. [0; shared-prefix: 1024]"),
    ] = None
    groups: Annotated[int, typer.Option(min=1, help="Different shared prefixes.")] = 1
    turns: Annotated[
        int | None, typer.Option(min=1, help="Of a conversation. [1; multi-turn: 5]")
    ] = None
    alive: Annotated[
        int, typer.Option(min=0, help="Conversations that take turns; 0: as many as at once.")
    ] = 0
    trace_scale: Annotated[
        float, typer.Option(min=0.001, help="Tokens per recorded token of a trace.")
    ] = 1 / 16
    trace_time: Annotated[
        float, typer.Option(min=0.0, help="Seconds per recorded second of a trace.")
    ] = 1.0
    spread: Annotated[float, typer.Option(min=0, max=1, help="Lengths vary by this share.")] = 0.0
    vocab_size: Annotated[int, typer.Option(min=2, help="Prompts use ids below this.")] = 1000
    seed: Annotated[int, typer.Option(help="Prompts and arrivals follow from it.")] = 0
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the measured ones.")] = 4
    slo_ttft: Annotated[float | None, typer.Option(help="Bound for goodput, ms.")] = None
    slo_tpot: Annotated[float | None, typer.Option(help="Bound for goodput, ms.")] = None
    json: JsonFile = None
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id.", rich_help_panel=CLUSTER)
    ] = None
    prefill: Annotated[int, typer.Option(min=1, rich_help_panel=CLUSTER)] = 1
    decode: Annotated[int, typer.Option(min=1, rich_help_panel=CLUSTER)] = 1
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Then the same load on as many co-located workers.",
            rich_help_panel=CLUSTER,
        ),
    ] = False
    colocated: Annotated[
        bool, typer.Option("--colocated", help="Only that.", rich_help_panel=CLUSTER)
    ] = False
    device: Annotated[str, typer.Option(rich_help_panel=CLUSTER)] = "auto"
    dtype: Annotated[str, typer.Option(rich_help_panel=CLUSTER)] = "auto"
    transport: Annotated[str, typer.Option(rich_help_panel=CLUSTER)] = "auto"
    policies: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="One cluster for each routing policy; A+local: without fetching KV.",
            rich_help_panel=CLUSTER,
        ),
    ] = None
    store_memory_mib: Annotated[
        int, typer.Option(min=0, help="With a KV store.", rich_help_panel=CLUSTER)
    ] = 0
    num_blocks: Annotated[
        int | None, typer.Option(help="KV blocks of a worker.", rich_help_panel=CLUSTER)
    ] = None

    def plan(self) -> LoadPlan:
        """Raises ConfigError when there is no such workload."""
        kind, _, trace = self.workload.partition(":")
        if kind not in _WORKLOADS or (kind == "trace") != bool(trace):
            raise ConfigError(
                f"no workload {self.workload!r}: there are plain, shared-prefix, multi-turn and "
                "trace:FILE"
            )
        prefix, turns = _WORKLOADS[kind]
        return LoadPlan(
            Shape(
                self.input_tokens,
                self.output_tokens,
                self.vocab_size,
                prefix if self.shared_prefix is None else self.shared_prefix,
                self.spread,
                self.seed,
                self.groups,
                turns if self.turns is None else self.turns,
            ),
            self.requests,
            self.concurrency,
            self.rate,
            self.warmup,
            Slo(_seconds(self.slo_ttft), _seconds(self.slo_tpot)),
            self.alive,
            trace,
            TraceScale(self.trace_scale, self.trace_time),
        )

    def clusters(self) -> dict[str, ServeOptions]:
        """What to start, by the name that its results get."""
        common: dict[str, Any] = {
            "model": self.model,
            "port": 0,
            "grpc_port": 0,
            "device": self.device,
            "dtype": self.dtype,
            "transport": self.transport,
            "store_memory_mib": self.store_memory_mib,
            "num_blocks": self.num_blocks,
        }
        if self.policies is not None:
            shape: dict[str, Any] = {
                "prefill": self.prefill,
                "decode": self.decode,
                "colocated": self.colocated,
            }
            return {
                entry: ServeOptions(
                    policy=entry.removesuffix(LOCAL),
                    kv_fetch=not entry.endswith(LOCAL),
                    **shape,
                    **common,
                )
                for entry in self.policies.split(",")
            }
        split = ServeOptions(prefill=self.prefill, decode=self.decode, **common)
        workers = self.prefill + self.decode
        colocated = ServeOptions(colocated=True, decode=workers, **common)
        names = {f"{self.prefill}P{self.decode}D": split, f"{workers} co-located": colocated}
        if self.compare:
            return names
        wanted = colocated if self.colocated else split
        return {name: options for name, options in names.items() if options is wanted}


def bench_serve(options: BenchServeOptions) -> None:
    """Load a cluster: TTFT, TPOT, ITL, tokens/s and goodput, as its clients see them."""
    runs = asyncio.run(_runs(options))
    if options.json is not None:
        write_json(as_json(options.plan(), runs, sys.argv[1:]), options.json)
    if options.json != "-":
        _print_table(runs)


async def _runs(options: BenchServeOptions) -> dict[str, Run]:
    if options.url is not None:
        tls = trusted(options.ca_file)
        return {options.url: await _measure(options.url, options.plan(), options.url, tls)}
    return {
        name: await with_cluster(cluster, partial(_measure, name, options.plan()))
        for name, cluster in options.clusters().items()
    }


async def with_cluster(cluster: ServeOptions, measure: Callable[[str], Awaitable[T]]) -> T:
    """Start a cluster, measure it by its URL, and end it."""
    results: list[T] = []
    with Reporter(as_json=False, verbose=False) as reporter:
        model = await find_model(cluster, reporter)
        supervisor = Supervisor(make_plan(cluster, model, new_environ()), reporter)

        async def load(addresses: Addresses) -> None:
            reporter.settle()
            results.append(await measure(addresses.url))
            supervisor.stop()

        await supervisor.run(load)
    if not results:
        raise KeyboardInterrupt
    return results[0]


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


async def _measure(name: str, plan: LoadPlan, url: str, tls: ssl.SSLContext | None = None) -> Run:
    with progress_bar() as progress:
        task = progress.add_task(f"{name}: warm-up", total=None)

        def advance(ended: int, total: int) -> None:
            progress.update(task, description=name, completed=ended, total=total)

        return await measure(url, plan, advance, api_key(), tls)


def _print_table(runs: Mapping[str, Run]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    columns = []
    for name, summary in runs.items():
        table.add_column(name, justify="right")
        columns.append(dict(rows(summary)))
    labels = list(dict.fromkeys(label for column in columns for label in column))
    for label in labels:
        table.add_row(label, *(column.get(label, "") for column in columns))
    Console().print(table)


def write_json(result: Mapping[str, Any], target: str) -> None:
    data = orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n"
    if target == "-":
        sys.stdout.write(data.decode())
    else:
        Path(target).write_bytes(data)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
