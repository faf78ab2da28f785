"""`baton top`: the fleet, live."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from baton.cli.options import Url, connect
from baton.cli.status import blocks_in_use, fleet_table, members
from baton.client.http import DEFAULT_URL, Client
from baton.errors import BatonError
from baton.types.fleet import BlockState


def top(
    url: Url = DEFAULT_URL,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between updates.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,
) -> None:
    """Watch the fleet until Ctrl-C."""
    asyncio.run(_watch(url, interval, once))


async def _watch(url: str, interval_s: float, once: bool) -> None:
    console = Console()
    async with connect(url, timeout_s=10.0) as client:
        first = view(url, await client.cluster())  # no cluster at all is an error, not a view
        if once:
            console.print(first)
            return
        with Live(first, console=console, screen=console.is_terminal) as live:
            while True:
                await asyncio.sleep(interval_s)
                live.update(await _next_view(url, client))


async def _next_view(url: str, client: Client) -> RenderableType:
    try:
        return view(url, await client.cluster())
    except BatonError as error:  # keep watching: it may come back
        return Text(error.message, style="red")


def view(url: str, cluster: Mapping[str, Any]) -> RenderableType:
    """The fleet's table and a bar of used blocks for each worker."""
    bars = Table(box=None, show_header=False, pad_edge=False)
    for member in members(cluster):
        blocks: Mapping[str, int] = member.get("blocks") or {}
        total = sum(blocks.values())
        if not total:
            continue
        used = blocks_in_use(blocks)
        bars.add_row(
            str(member.get("name", "")),
            ProgressBar(total=total, completed=used, width=24),
            f"{used}/{total} blocks in use, {blocks.get(BlockState.CACHED, 0)} cached",
        )
    return Group(Text(url, style="bold"), fleet_table(cluster), Text(), bars)
