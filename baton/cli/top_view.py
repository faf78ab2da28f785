"""What `baton top` shows of a look at the cluster (`GET /live.json`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from baton.cli.status import blocks_in_use, fleet_table, members, refused_lines, store_lines
from baton.types.fleet import BlockState

Look = Mapping[str, Any]

MAX_FLOWS = 6
MAX_REQUESTS = 10
MIN_REQUESTS = 3
_WIDE = 100  # columns that a terminal needs for everything about a request
_MINUTE = 0  # which of the look's periods
_PLACES = {"own": "own pool", "peer": "other pools", "cpu": "memory", "nvme": "NVMe"}
_COLOURS = {"ok": "green", "running": "cyan", "cancelled": "yellow"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def view(url: str, look: Look, width: int, height: int | None) -> RenderableType:
    """Figures, fleet, KV and requests. With `height`, as many requests as fit into the lines."""
    upper: list[RenderableType] = [
        *_figures(url, look),
        Text(),
        fleet_table(look),
        Text(),
        _bars(look),
        *store_lines(look),
        *refused_lines(look),
        *_flows(look.get("flows") or ()),
    ]
    requests = look.get("requests") or ()
    if not requests:
        return Group(*upper)
    used = len(members(look)) * 2 + len(upper) + 6
    room = MAX_REQUESTS if height is None else max(height - used, MIN_REQUESTS)
    return Group(*upper, Text(), _requests(requests[: min(room, MAX_REQUESTS)], look, width))


def _figures(url: str, look: Look) -> list[Text]:
    head = Text.assemble((url, "bold"), f"  {look.get('model', '')}  ")
    if "ready" in look:
        head.append(*(("ready", "green") if look["ready"] else ("no worker can answer", "red")))
    if look.get("note"):
        head.append(look["note"], "yellow")
    if not look.get("periods"):
        return [head]
    minute, now, slos = look["periods"][_MINUTE], look["now"], look["slos"]
    failed = f" ({minute['failed']} not answered)" if minute["failed"] else ""
    running = look["conductors"][0]["running"]
    return [
        head,
        _line("TTFT", _percentiles(minute["ttft_s"])),
        _line("TPOT", _percentiles(minute["tpot_s"])),
        _line("goodput", _goodput(minute, slos)),
        _line("hit rate", _hits(minute)),
        _line("requests", f"{now['requests_per_s']:.3g}/s, {running} running, ")
        .append(f"{minute['requests']} in the last minute")
        .append(failed, "red"),
        _line("tokens", f"{now['tokens_per_s']:.4g}/s"),
    ]


def _line(name: str, text: str) -> Text:
    return Text.assemble((f"{name:<9}", "bold"), text)


def _percentiles(values: Mapping[str, float] | None) -> str:
    if values is None:
        return "–"
    return "   ".join(f"{name} {_duration(value)}" for name, value in values.items())


def _goodput(period: Look, slos: Mapping[str, float | None]) -> str:
    if period["goodput_per_s"] is None:
        return "no SLO is set"
    named = {"TTFT": slos["ttft_s"], "TPOT": slos["tpot_s"]}
    within = ", ".join(f"{name} ≤ {_duration(s)}" for name, s in named.items() if s is not None)
    return f"{period['goodput_per_s']:.3g}/s   {within}"


def _hits(period: Look) -> str:
    tokens = period["prompt_tokens"]
    if not tokens:
        return "–"
    shares = [
        f"{_PLACES.get(place, place)} {count / tokens:.1%}"
        for place, count in period["hits"].items()
        if count
    ]
    return f"{sum(period['hits'].values()) / tokens:.1%}   {', '.join(shares)}".rstrip()


def _bars(look: Look) -> Table:
    """How full each worker's pool is."""
    bars = Table(box=None, show_header=False, pad_edge=False)
    for member in members(look):
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
    return bars


def _flows(flows: Sequence[Look]) -> list[Text]:
    """Those with most bytes in the last minute."""
    lines = [
        Text(
            f"KV {flow['source']} → {flow['target']} ({flow['kind']}): "
            f"{_bytes(flow['bytes_per_s'])}/s, {_bytes(flow['bytes'])} in the last minute"
        )
        for flow in flows[:MAX_FLOWS]
    ]
    if len(flows) > MAX_FLOWS:
        lines.append(Text(f"KV between {len(flows) - MAX_FLOWS} pairs more", style="dim"))
    return lines


def _requests(requests: Sequence[Look], look: Look, width: int) -> Table:
    """The newest first; a narrow terminal gets the columns that tell most."""
    wide = width >= _WIDE
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("request", no_wrap=True, max_width=None if wide else 22)
    table.add_column("state", no_wrap=True)
    for name in ("prompt", "cached", "output") if wide else ("output",):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("TTFT", "TPOT", "time") if wide else ("TTFT", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("workers", overflow="fold")
    for request in requests:
        table.add_row(*_request(request, look["time_s"], wide))
    return table


def _request(request: Look, now_s: float, wide: bool) -> list[str | Text]:
    outcome = request["outcome"]
    time_s = request["duration_s"]
    if time_s is None:
        time_s = max(now_s - request["received_s"], 0.0)
    cached = "–" if outcome == "running" else str(request["cached_tokens"])
    pair = [str(request[name]) for name in ("prefill", "decode") if request[name]]
    return [
        request["id"],
        Text(outcome, style=_COLOURS.get(outcome, "red")),
        *([str(request["prompt_tokens"]), cached] if wide else []),
        str(request["output_tokens"]),
        _duration(request["ttft_s"]),
        *([_duration(request["tpot_s"])] if wide else []),
        _duration(time_s),
        " → ".join(pair) or "–",
    ]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _bytes(number: float) -> str:
    for unit in _UNITS[:-1]:
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.3g} {_UNITS[-1]}"
