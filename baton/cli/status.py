"""`baton status`: the fleet at one moment."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton.cli.options import Json, Url, connect
from baton.client.http import DEFAULT_URL
from baton.types.fleet import BlockState

_STATE_COLOURS = {"live": "green", "draining": "yellow", "suspect": "yellow", "dead": "red"}


def status(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """List conductors, workers and stores with their load and blocks."""
    cluster = asyncio.run(_fetch(url))
    if as_json:
        sys.stdout.write(orjson.dumps(cluster).decode() + "\n")
    else:
        Console().print(fleet_table(cluster))


async def _fetch(url: str) -> dict[str, Any]:
    async with connect(url) as client:
        return await client.cluster()


def members(cluster: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every process of a `GET /cluster` answer."""
    kinds = ("conductors", "workers", "stores")
    return [member for kind in kinds for member in cluster.get(kind) or ()]


def fleet_table(cluster: Mapping[str, Any]) -> Table:
    """One row per process; blocks in the states that they are in."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("name", "role", "pid", "address", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("running", "waiting", *BlockState):
        table.add_column(str(name), justify="right", no_wrap=True)
    for member in members(cluster):
        blocks = member.get("blocks") or {}
        state = str(member.get("state", ""))
        table.add_row(
            *(str(member.get(name, "")) for name in ("name", "role", "pid", "address")),
            Text(state, style=_STATE_COLOURS.get(state, "")),
            *(str(member.get(name, "")) for name in ("running", "waiting")),
            *(str(blocks[state]) if state in blocks else "" for state in BlockState),
        )
    return table
