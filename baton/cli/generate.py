"""`baton generate`: one streamed completion from a running cluster."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import orjson
import typer

from baton.cli.options import CaFile, Json, Url, connect
from baton.client.http import DEFAULT_URL, Client, Prompt
from baton.client.timing import Stopwatch, Timing
from baton.errors import InternalError


def generate(
    text: Annotated[str, typer.Argument(help="The prompt.")],
    url: Url = DEFAULT_URL,
    max_tokens: Annotated[int, typer.Option(help="Length of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 = always the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text.")] = None,
    timing: Annotated[bool, typer.Option("--timing", help="TTFT, TPOT, tokens/s.")] = False,
    as_json: Json = False,
    ca_file: CaFile = "",
) -> None:
    """Stream one completion from a running cluster."""
    options: dict[str, Any] = {"temperature": temperature}
    options |= {
        name: value
        for name, value in (("top_p", top_p), ("seed", seed), ("stop", stop))
        if value is not None
    }
    prompt = Prompt(text, max_tokens=max_tokens, options=options)
    asyncio.run(_generate(url, ca_file, prompt, timing, as_json))


async def _generate(url: str, ca_file: str, prompt: Prompt, timing: bool, as_json: bool) -> None:
    async with connect(url, ca_file) as client:
        if as_json:
            answer = await collect(client, prompt, on_text=lambda text: None)
            _write(orjson.dumps(_fields(answer)).decode() + "\n")
        else:
            await print_answer(client, prompt, timing)


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish_reason: str
    timing: Timing


async def collect(client: Client, prompt: Prompt, on_text: Callable[[str], None]) -> Answer:
    """One whole answer; `on_text` gets each part as it arrives. Raises BatonError."""
    if not prompt.model:
        await client.default_model()  # looked up before the clock starts
    watch = Stopwatch()
    parts = []
    finish_reason = None
    async with aclosing(watch.watch(client.stream(prompt))) as pieces:
        async for piece in pieces:
            finish_reason = piece.finish_reason or finish_reason
            parts.append(piece.text)
            on_text(piece.text)
    if finish_reason is None:
        raise InternalError("the answer ended without a finish reason")
    return Answer("".join(parts), finish_reason, watch.timing)


async def print_answer(client: Client, prompt: Prompt, timing: bool, echo: bool = False) -> Answer:
    """Stream an answer to standard output; the timing line goes to standard error.

    With `echo` the prompt's text comes first, so that a completion reads as one text.
    """
    written = 0

    def write(text: str) -> None:
        nonlocal written
        written += len(text)
        _write(text)

    if echo and isinstance(prompt.content, str):
        write(prompt.content)
    try:
        answer = await collect(client, prompt, on_text=write)
    finally:
        if written:
            _write("\n")
    if timing:
        sys.stderr.write(answer.timing.describe() + "\n")
        sys.stderr.flush()
    return answer


def _fields(answer: Answer) -> dict[str, Any]:
    timing = answer.timing
    return {
        "request_id": timing.request_id,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": asdict(timing.usage),
        "ttft_s": timing.ttft_s,
        "tpot_s": timing.tpot_s,
        "tokens_per_s": timing.tokens_per_s,
    }


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
