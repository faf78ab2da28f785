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

from baton.cli.options import CaFile, Json, Url, connect
from baton.client.http import DEFAULT_URL
from baton.types.figures import TierState
from baton.types.fleet import BlockState
from baton.types.kv_events import Tier

MIB = 1 << 20

_IDLE = (BlockState.FREE, BlockState.CACHED)
_STATE_COLOURS = {"live": "green", "draining": "yellow", "suspect": "yellow", "dead": "red"}


def status(url: Url = DEFAULT_URL, as_json: Json = False, ca_file: CaFile = "") -> None:
    """List conductors, workers and stores with their load and blocks."""
    cluster = asyncio.run(_fetch(url, ca_file))
    if as_json:
        sys.stdout.write(orjson.dumps(cluster).decode() + "\n")
    else:
        console = Console()
        console.print(fleet_table(cluster))
        for line in (*store_lines(cluster), *refused_lines(cluster)):
            console.print(line, soft_wrap=True)


async def _fetch(url: str, ca_file: str) -> dict[str, Any]:
    async with connect(url, ca_file) as client:
        return await client.cluster()


def members(cluster: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every process of a `GET /cluster` answer."""
    kinds = ("conductors", "workers", "stores")
    return [member for kind in kinds for member in cluster.get(kind) or ()]


def fleet_table(cluster: Mapping[str, Any]) -> Table:
    """One row per process, within 80 columns. Of its KV blocks those that are in use (active,
    leased, quarantined), cached and there at all: `--json` has every state."""
    placed = [
        f"{member['name']} {member['cpus']}" for member in members(cluster) if member.get("cpus")
    ]
    caption = f"CPUs: {'; '.join(placed)}" if placed else None
    table = Table(
        box=None, header_style="bold", pad_edge=False, caption=caption, caption_justify="left"
    )
    columns = ("name", *(("role",) if _roles_differ(cluster) else ()), "pid", "address")
    for name in (*columns, "state"):
        table.add_column(name, overflow="fold")
    for name in ("run", "wait", "used", "cached", "blocks"):
        table.add_column(name, justify="right", no_wrap=True)
    for member in members(cluster):
        state = str(member.get("state", ""))
        table.add_row(
            *(str(member.get(name, "")) for name in columns),
            Text(state, style=_STATE_COLOURS.get(state, "")),
            *(str(member.get(name, "")) for name in ("running", "waiting")),
            *_block_cells(member.get("blocks") or {}),
        )
    return table


def store_lines(cluster: Mapping[str, Any]) -> list[Text]:
    """How full each tier of each store is; one that takes no blocks stands out, with its reason."""
    lines = []
    for store in cluster.get("stores") or ():
        figures = store.get("store") or {}
        for tier in figures.get("tiers", ()):
            line = _tier_line(str(store["name"]), tier)
            if tier["tier"] == Tier.CPU and figures.get("pinned"):
                line.append(f"; {figures['pinned']} blocks pinned")
            lines.append(line)
    return lines


def refused_lines(cluster: Mapping[str, Any]) -> list[Text]:
    """Processes that wanted to join of late, and why they may not."""
    return [
        Text(f"refused: {each['reason']} ({each['address']}, pid {each['pid']})", style="red")
        for each in cluster.get("refused") or ()
    ]


def _tier_line(store: str, tier: Mapping[str, Any]) -> Text:
    held, room = tier["bytes"] / MIB, tier["capacity_bytes"] / MIB
    text = f"{store}: {tier['tier']} {tier['blocks']} blocks, {held:,.1f} of {room:,.1f} MiB"
    if tier["state"] == TierState.ON:
        return Text(text)
    return Text(f"{text}; {_tier_name(tier)} {tier['state']}: {tier['why']}", style="red")


def _roles_differ(cluster: Mapping[str, Any]) -> bool:
    """Whether some name does not say the role: those of elastic workers, and chosen ones. Otherwise
    a terminal of 80 columns needs the room."""
    return any(not str(m["name"]).startswith(str(m.get("role", ""))) for m in members(cluster))


def _tier_name(tier: Mapping[str, Any]) -> str:
    return "disk tier" if tier["tier"] == Tier.NVME else "memory tier"


def blocks_in_use(blocks: Mapping[str, int]) -> int:
    """Blocks that a request holds, or that a transfer may still touch."""
    return sum(blocks.values()) - sum(blocks.get(state, 0) for state in _IDLE)


def _block_cells(blocks: Mapping[str, int]) -> tuple[str, str, str]:
    if not blocks:
        return ("", "", "")
    cached = blocks.get(BlockState.CACHED, 0)
    return (str(blocks_in_use(blocks)), str(cached), str(sum(blocks.values())))
