"""What routing costs, part by part: `python -m conductor.bench_router --json FILE`.

A part is a function from the plan to figures; add one to PARTS.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from baton.bench.origin import origin
from baton.cli.bench import JsonFile, write_json
from baton.rpc.tls import TlsConfig
from conductor import (
    bench_decisions,
    bench_keys,
    bench_map,
    bench_policies,
    bench_relay,
    bench_tenants,
    bench_tls,
)
from conductor.bench_figures import Figure, Plan

PARTS: Mapping[str, Callable[[Plan], Iterator[Figure]]] = {
    "map": bench_map.measure,
    "ring": bench_keys.measure_ring,
    "hashing": bench_keys.measure_hashing,
    "decisions": bench_decisions.measure_decisions,
    "policies": bench_policies.measure_policies,
    "relay": bench_relay.measure_relay,
    "tenants": bench_tenants.measure_tenants,
    "tls": bench_tls.measure_tls,
}
_ALONE = ",".join(part for part in PARTS if part != "tls")  # what needs no files


def bench_router(
    workers: Annotated[int, typer.Option(min=1, help="In the pretended cluster.")] = 1000,
    blocks: Annotated[int, typer.Option(min=1000, help="KV blocks that they hold.")] = 10_000_000,
    prompt_tokens: Annotated[int, typer.Option(min=2048, help="Of a long prompt.")] = 131_072,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens.")] = 32,
    seed: Annotated[int, typer.Option(help="Keys and prompts follow from it.")] = 0,
    parts: Annotated[str, typer.Option(help=f"Some of {','.join(PARTS)}.")] = _ALONE,
    tls_cert: Annotated[str, typer.Option(envvar="BATON_TLS_CERT", help="For the part tls.")] = "",
    tls_key: Annotated[str, typer.Option(envvar="BATON_TLS_KEY")] = "",
    tls_ca: Annotated[str, typer.Option(envvar="BATON_TLS_CA")] = "",
    json: JsonFile = None,
) -> None:
    """Measure the prefix map, the ring, block keys, and keys and limits of tenants on one core."""
    tls = TlsConfig(tls_cert, tls_key, tls_ca) if tls_cert and tls_key and tls_ca else None
    plan = Plan(workers, blocks, prompt_tokens, block_size, seed, tls)
    figures: list[Figure] = []
    with Console(stderr=True).status("measuring") as status:
        for part in _chosen(parts):
            status.update(part)
            figures += PARTS[part](plan)
    if json is not None:
        write_json(_as_json(plan, figures), json)
    if json != "-":
        Console().print(_table(plan, figures))


def _chosen(parts: str) -> list[str]:
    names = [name.strip() for name in parts.split(",")]
    for name in names:
        if name not in PARTS:
            raise typer.BadParameter(f"--parts takes some of {', '.join(PARTS)}, not {name!r}")
    return names


def _as_json(plan: Plan, figures: list[Figure]) -> dict[str, Any]:
    """The figures with what is needed to repeat them."""
    return {
        **origin("router", "python", "-m", "conductor.bench_router", *sys.argv[1:]),
        "plan": asdict(plan),
        "results": [asdict(figure) for figure in figures],
    }


def _table(plan: Plan, figures: list[Figure]) -> Table:
    drawn = Table(title=f"Routing, {plan.workers:,} workers, {plan.blocks:,} blocks, one core")
    drawn.add_column("part")
    drawn.add_column("what")
    drawn.add_column("measured", justify="right")
    drawn.add_column("target or peer")
    part = ""
    for figure in figures:
        if part and figure.part != part:
            drawn.add_section()
        shown = figure.part if figure.part != part else ""
        part = figure.part
        value = f"{figure.value:,.0f}" if abs(figure.value) >= 100 else f"{figure.value:.3g}"
        drawn.add_row(shown, figure.name, f"{value} {figure.unit}".strip(), figure.target)
    return drawn


if __name__ == "__main__":
    typer.run(bench_router)
