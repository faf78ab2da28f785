"""The benchmark's client and figures, against a server in the same loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from bench.client import Ask, Target, complete, ready
from bench.measure import Driver, split_gaps
from bench.workloads import Arrivals, Interference, Sweep, Waves

Answer = Callable[[dict[str, object]], list[bytes]]


def tokens(count: int, per_event: int = 1, usage: int | None = None) -> list[bytes]:
    """Chunks of an answer of `count` tokens; `usage`: what the server says that it was."""
    texts = [" w1" * min(per_event, count - at) for at in range(0, count, per_event)]
    events: list[dict[str, object]] = [
        {"choices": [{"text": text, "finish_reason": None}]} for text in texts
    ]
    events[-1] = {"choices": [{"text": texts[-1], "finish_reason": "length"}]}
    said = count if usage is None else usage
    events.append({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": said}})
    return [*(b"data: %s\n\n" % json.dumps(e).encode() for e in events), b"data: [DONE]\n\n"]


def whole(body: dict[str, object]) -> list[bytes]:
    count = body["max_tokens"]
    assert isinstance(count, int)
    return tokens(count)


@asynccontextmanager
async def serving(answer: Answer, status: int = 200) -> AsyncIterator[Target]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
        writer.write(
            b"HTTP/1.1 %d X\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n" % status
        )
        for chunk in answer(json.loads(body)) if body else []:
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Target("127.0.0.1", port, "m")


async def ask(answer: Answer, count: int = 4, status: int = 200) -> str | None:
    async with serving(answer, status) as target:
        return (await complete(target, Ask((20, 21), count), 0.0, timeout_s=10)).error


async def test_a_whole_answer() -> None:
    async with serving(lambda _: tokens(5, per_event=2)) as target:
        outcome = await complete(target, Ask((20, 21), 5), 0.0, timeout_s=10)
        assert await ready(target.host, target.port, "/ready")
    assert outcome.timing is not None
    assert len(outcome.timing.arrivals_s) == 3
    assert outcome.timing.usage.completion_tokens == 5
    assert not await ready(target.host, target.port, "/ready")


async def test_requests_ask_for_exact_greedy_answers() -> None:
    seen: list[dict[str, object]] = []

    def answer(body: dict[str, object]) -> list[bytes]:
        seen.append(body)
        return tokens(3)

    async with serving(answer) as target:
        text = Target(target.host, target.port, "m", text_only=True)
        for each in (target, text):
            await complete(each, Ask((20, 21), 3), 0.0, timeout_s=10)
    assert seen[0]["prompt"] == [20, 21]
    assert seen[0]["ignore_eos"] is True
    assert seen[1]["prompt"] == "w20 w21"
    assert "ignore_eos" not in seen[1]
    assert {body["temperature"] for body in seen} == {0.0}


async def test_what_is_no_whole_answer_is_an_error() -> None:
    assert await ask(whole) is None
    assert await ask(lambda _: tokens(3)) == "3 tokens instead of 4"
    assert await ask(lambda _: tokens(4)[:2]) == "the stream ended before the answer was complete"
    assert "not JSON" in str(await ask(lambda _: [b"data: {\n\n"]))
    assert await ask(lambda _: [b'data: {"error": {"message": "full"}}\n\n']) == "full"
    assert str(await ask(lambda _: [b""], status=503)).startswith("HTTP 503")


async def test_nobody_listening_is_an_error() -> None:
    async with serving(whole) as target:
        pass
    outcome = await complete(target, Ask((20,), 1), 0.0, timeout_s=10)
    assert str(outcome.error).startswith("connect: ")


async def test_figures_of_loads() -> None:
    asks = tuple(Ask((20, 21), count) for count in (1, 2, 3))
    async with serving(whole) as target:
        driver = Driver(target, timeout_s=10, rate_per_s=1000.0)
        waves = await driver.run(Waves((asks, asks), 2))
        sweep = await driver.run(Sweep(((1, asks), (3, asks))))
        arrivals = await driver.run(Arrivals(asks, (0.0, 1.0, 2.0), (), own_rate=False))
        rate = await driver.saturation_rate(asks)
    assert waves.figures["requests"] == 6
    assert waves.figures["output_tokens"] == sweep.figures["output_tokens"] == 12
    assert waves.figures["tokens_per_event"] == 1
    assert sweep.figures["best_concurrency"] in (1, 3)
    assert sweep.figures["output_tokens_per_s_at_3"] > 0
    assert arrivals.figures["rate_per_s"] == 1000.0
    assert rate > 0
    for measured in (waves, sweep, arrivals):
        assert measured.figures["failed"] == 0
        assert measured.errors == ()
        assert measured.figures["client_us_per_token"] > 0


async def test_failures_are_counted() -> None:
    asks = tuple(Ask((20, 21), 4) for _ in range(3))
    async with serving(lambda _: tokens(2)) as target:
        measured = await Driver(target, timeout_s=10).run(Waves((asks,), 2))
        with pytest.raises(RuntimeError, match="3 failed: 2 tokens instead of 4"):
            await Driver(target, timeout_s=10).saturation_rate(asks)
    assert measured.figures["failed"] == 3
    assert measured.errors == (("2 tokens instead of 4", 3),)


async def test_streams_that_end_before_the_long_prompt_are_no_result() -> None:
    async with serving(whole) as target:
        load = Interference((Ask((20,), 4),) * 2, 2, Ask((20,) * 9, 2))
        measured = await Driver(target, timeout_s=10).run(load)
    assert measured.figures["failed"] == 1
    assert "a stream ended" in measured.errors[0][0]


def test_gaps_are_split_by_the_long_prompt() -> None:
    streams = [[0.0, 1.0, 2.0, 5.0, 6.0], [0.5, 1.5, 2.5, 4.5, 9.0]]
    before, during = split_gaps(streams, sent=3.0, first=5.5)
    assert before == [1.0, 1.0, 1.0]  # [0, 1] began before the other stream's first token
    assert during == [3.0, 1.0, 2.0, 4.5]
