"""`baton trace`: where the time of one request went."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from baton.cli.options import Json, Url, connect
from baton.client.http import DEFAULT_URL

_BAR_WIDTH = 44
_OTHER_COLUMNS = 50  # characters that the table needs besides the bars
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue")


def trace(
    request_id: Annotated[str, typer.Argument(help="As in the response's `id`.")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Show one recent request's timeline: workers, reasons, spans."""
    timeline = asyncio.run(_fetch(url, request_id))
    if as_json:
        sys.stdout.write(orjson.dumps(timeline).decode() + "\n")
    else:
        console = Console()
        console.print(render(timeline, console.width))


async def _fetch(url: str, request_id: str) -> dict[str, Any]:
    async with connect(url) as client:
        return await client.trace(request_id)


def render(timeline: Mapping[str, Any], width: int = 100) -> RenderableType:
    """A header, the choice of workers with its reasons, and one bar for each span. The bars shrink
    where `width` characters of terminal leave them less room."""
    header = Text.assemble(
        (str(timeline.get("request_id", "")), "bold"),
        f"  {timeline.get('model', '')}  {timeline.get('outcome', '')}  "
        f"{timeline.get('prompt_tokens', 0)} prompt tokens "
        f"({timeline.get('cached_tokens', 0)} cached), "
        f"{timeline.get('output_tokens', 0)} output tokens",
    )
    error = [Text(str(timeline["error"]))] if timeline.get("error") else []
    return Group(header, *error, *_choices(timeline), _bars(timeline, width))


def _choices(timeline: Mapping[str, Any]) -> list[Text]:
    lines = []
    for attempt in timeline.get("attempts") or ():
        pair = " → ".join(str(attempt[key]) for key in ("prefill", "decode") if attempt.get(key))
        reasons = "; ".join(attempt.get("reasons") or ())
        lines.append(Text(f"attempt {attempt.get('attempt', '')}: {pair}  ({reasons})"))
        if "predicted_ttft_s" in attempt:
            lines.append(Text(_predicted(attempt, timeline.get("margins") or {})))
        if attempt.get("resumed_at"):
            lines.append(Text(f"  went on behind {attempt['resumed_at']} tokens"))
        if attempt.get("ended") not in (None, "complete"):
            lines.append(Text(f"  ended: {attempt['ended']}"))
        lines += [Text(_candidate(candidate)) for candidate in attempt.get("candidates") or ()]
    return lines


def _predicted(attempt: Mapping[str, Any], margins: Mapping[str, float]) -> str:
    """What admission went by: without a margin, there is no SLO."""
    parts = []
    for name in ("ttft", "tpot"):
        margin = f" (× {margins[name]:.2f} for admission)" if name in margins else ""
        parts.append(f"{name.upper()} {_ms(attempt[f'predicted_{name}_s'])}{margin}")
    return f"  predicted: {', '.join(parts)}" + (", a guess" if attempt.get("is_guess") else "")


def _candidate(candidate: Mapping[str, Any]) -> str:
    """What was expected of a worker that could have computed the prompt."""
    parts = [f"queue {_ms(candidate['queue_s'])}"]
    if candidate.get("fetch_tokens"):
        parts.append(f"fetch {candidate['fetch_tokens']} tokens {_ms(candidate['fetch_s'])}")
    parts.append(f"prefill {_ms(candidate['prefill_s'])}")
    cached = candidate.get("cached_tokens")
    return (
        f"  {candidate['worker']} ({candidate['why']}): {' + '.join(parts)} = "
        f"{_ms(candidate['ttft_s'])}" + (f", {cached} tokens cached" if cached else "")
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _bars(timeline: Mapping[str, Any], width: int) -> Table:
    bar_width = max(8, min(_BAR_WIDTH, width - _OTHER_COLUMNS))
    spans = timeline.get("spans") or []
    start = min([timeline.get("received_s", 0.0), *(span["start_s"] for span in spans)])
    end = max((span["end_s"] for span in spans), default=start)
    total = max(end - start, 1e-9)
    sources = list(dict.fromkeys(span["source"] for span in spans))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("source", "span", "", "start ms", "ms"):
        table.add_column(column, justify="right" if "ms" in column else "left", no_wrap=True)
    for span in spans:
        begin, length = span["start_s"] - start, span["end_s"] - span["start_s"]
        colour = _COLOURS[sources.index(span["source"]) % len(_COLOURS)]
        table.add_row(
            span["source"],
            span["name"],
            Text(bar(begin / total, length / total, bar_width), style=colour),
            f"{begin * 1e3:.1f}",
            f"{length * 1e3:.1f}",
        )
    return table


def bar(begin: float, length: float, width: int = _BAR_WIDTH) -> str:
    """`width` characters with a bar over the share [begin, begin + length]; at least one mark."""
    left = min(round(begin * width), width - 1)
    marks = max(1, round((begin + length) * width) - left)
    return (" " * left + "█" * min(marks, width - left)).ljust(width)
