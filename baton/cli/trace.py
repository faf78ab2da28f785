"""`baton trace`: where the time of one request went."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from baton.cli.options import CaFile, Json, Url, connect
from baton.cli.waterfall import ms, span_bars, stage_bars
from baton.client.http import DEFAULT_URL


def trace(
    request_id: Annotated[str, typer.Argument(help="As in the response's `id`.")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    ca_file: CaFile = "",
) -> None:
    """Where one recent request's time went: stages of its TTFT, attempts and reasons, spans."""
    timeline = asyncio.run(_fetch(url, ca_file, request_id))
    if as_json:
        sys.stdout.write(orjson.dumps(timeline).decode() + "\n")
    else:
        console = Console()
        console.print(render(timeline, console.width))


async def _fetch(url: str, ca_file: str, request_id: str) -> dict[str, Any]:
    async with connect(url, ca_file) as client:
        return await client.trace(request_id)


def render(timeline: Mapping[str, Any], width: int = 100) -> RenderableType:
    """A header, the stages of the time to the first token, the choice of workers with its reasons,
    and one bar for each span. Bars shrink where `width` characters leave them less room."""
    header = Text.assemble(
        (str(timeline.get("request_id", "")), "bold"),
        f"  {timeline.get('model', '')}  {timeline.get('outcome', '')}  "
        f"{timeline.get('prompt_tokens', 0)} prompt tokens "
        f"({timeline.get('cached_tokens', 0)} cached), "
        f"{timeline.get('output_tokens', 0)} output tokens",
    )
    lines = [header]
    if timeline.get("trace_id"):
        lines.append(Text(f"trace {timeline['trace_id']}", style="dim"))
    if timeline.get("error"):
        lines.append(Text(str(timeline["error"]), style="red"))
    parts: list[RenderableType] = [*lines, *_first_token(timeline, width), *_choices(timeline)]
    return Group(*parts, *span_bars(timeline, width))


def _first_token(timeline: Mapping[str, Any], width: int) -> list[RenderableType]:
    stages = timeline.get("ttft_stages") or []
    if not stages:
        return []
    told = sum(stage["seconds"] for stage in stages)
    if timeline.get("ttft_s") is None:
        title = "no token came" if timeline.get("ended_s") else "no token yet"
        title = f"{title}; {ms(told)} are known"
        total = stages[-1]["end_s"] - timeline["received_s"]
    else:
        total = timeline["ttft_s"]
        title = f"TTFT {ms(total)}, {timeline.get('ttft_attributed') or 0:.1%} attributed"
    parts: list[RenderableType] = [Text(), Text(title, style="bold")]
    parts.append(stage_bars(stages, timeline["received_s"], total, width))
    later = timeline.get("second_token_stages") or []
    if later:
        named = ", ".join(f"{_name(stage)} {ms(stage['seconds'])}" for stage in later)
        parts.append(Text(f"then, until the second token: {named}"))
    return [*parts, *_pace(timeline), Text()]


def _pace(timeline: Mapping[str, Any]) -> list[Text]:
    """How fast the rest came, of a request with one answer."""
    answers = {str(attempt["attempt"]).rpartition("#")[0] for attempt in timeline["attempts"]}
    tokens = timeline.get("output_tokens", 0) - 1
    ended_s, ttft_s = timeline.get("ended_s"), timeline.get("ttft_s")
    if ended_s is None or ttft_s is None or tokens < 1 or len(answers) != 1:
        return []
    rest_s = ended_s - timeline["received_s"] - ttft_s
    return [Text(f"then {tokens} tokens in {ms(rest_s)}: TPOT {ms(rest_s / tokens)}")]


def _name(stage: Mapping[str, Any]) -> str:
    return str(stage["name"]).replace("_", " ")


def _choices(timeline: Mapping[str, Any]) -> list[Text]:
    lines = []
    for attempt in timeline.get("attempts") or ():
        pair = " → ".join(str(attempt[key]) for key in ("prefill", "decode") if attempt.get(key))
        reasons = "; ".join(attempt.get("reasons") or ())
        lines.append(Text(f"attempt {attempt.get('attempt', '')}: {pair}  ({reasons})"))
        if "predicted_ttft_s" in attempt:
            lines.append(Text(_predicted(attempt, timeline.get("margins") or {})))
        if "sent_s" in attempt:
            lines.append(Text(_times(attempt, timeline["received_s"])))
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
        parts.append(f"{name.upper()} {ms(attempt[f'predicted_{name}_s'])}{margin}")
    return f"  predicted: {', '.join(parts)}" + (", a guess" if attempt.get("is_guess") else "")


def _candidate(candidate: Mapping[str, Any]) -> str:
    """What was expected of a worker that could have computed the prompt."""
    parts = [f"queue {ms(candidate['queue_s'])}"]
    if candidate.get("fetch_tokens"):
        parts.append(f"fetch {candidate['fetch_tokens']} tokens {ms(candidate['fetch_s'])}")
    parts.append(f"prefill {ms(candidate['prefill_s'])}")
    cached = candidate.get("cached_tokens")
    return (
        f"  {candidate['worker']} ({candidate['why']}): {' + '.join(parts)} = "
        f"{ms(candidate['ttft_s'])}" + (f", {cached} tokens cached" if cached else "")
    )


def _times(attempt: Mapping[str, Any], received_s: float) -> str:
    """When it began and what came of it, from the request's arrival on."""
    parts = [f"sent at {ms(attempt['sent_s'] - received_s)}"]
    for key, what in (("first_token_s", "first token"), ("ended_s", "ended")):
        if attempt.get(key):
            parts.append(f"{what} at {ms(attempt[key] - received_s)}")
    return f"  {', '.join(parts)}"
