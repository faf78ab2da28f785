"""`baton top`: the cluster, live."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from baton.cli.options import CaFile, Url, connect
from baton.cli.top_view import view
from baton.client.http import DEFAULT_URL, Client
from baton.errors import BatonError, PermissionDenied, Unauthenticated


def top(
    url: Url = DEFAULT_URL,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between updates.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,
    ca_file: CaFile = "",
) -> None:
    """Watch figures, fleet, KV flows and the last requests until Ctrl-C."""
    asyncio.run(_watch(url, ca_file, interval, once))


async def _watch(url: str, ca_file: str, interval_s: float, once: bool) -> None:
    console = Console()
    async with connect(url, ca_file, timeout_s=10.0) as client:
        first = await look(client)  # no cluster at all is an error, not a view
        if once:
            console.print(view(client.url, first, console.width, None))
            return
        screen = console.is_terminal
        shown = view(client.url, first, console.width, _height(console))
        with Live(shown, console=console, screen=screen) as live:
            while True:
                await asyncio.sleep(interval_s)
                live.update(await _next_view(client, console))


async def look(client: Client) -> Mapping[str, Any]:
    """All that may be seen: without an admin's key, where keys are asked for, the fleet only."""
    try:
        return await client.live()
    except (Unauthenticated, PermissionDenied) as error:
        return {**await client.cluster(), "note": error.message}


async def _next_view(client: Client, console: Console) -> RenderableType:
    try:
        return view(client.url, await look(client), console.width, _height(console))
    except BatonError as error:  # keep watching: it may come back
        return Text(error.message, style="red")


def _height(console: Console) -> int | None:
    return console.height if console.is_terminal else None
