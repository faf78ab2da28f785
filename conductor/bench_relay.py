"""Relay: how many requests and tokens one conductor process passes on, and what it adds to them.

The workers are in the same process and on the same core, speak the real link over the in-memory
network, and compute nothing: a decode worker sends one token for each of its attempts per step.
HTTP and gRPC are not in it; `baton bench serve` has them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing

from baton.demo import demo_model_path
from baton.errors import PeerGone
from baton.model.spec import load_spec
from baton.rpc.memory import MemoryNetwork
from baton.rpc.services import Duplex
from baton.tokenizer import load_tokenizer
from baton.types.fleet import KvLayout, Role, WorkerInfo, WorkerLoad
from baton.types.link import (
    ConductorMessage,
    StartDecode,
    StartPrefill,
    StepReport,
    WorkerMessage,
)
from baton.types.request import AttemptId, AttemptOutput, Finish, FinishReason, SampledToken
from conductor.bench_figures import Figure, Plan, latencies
from conductor.request import Ask, Options
from conductor.service import Conductor, Policy, ServedModel

REQUESTS = 1500
STREAMS = 64
STREAM_TOKENS = 400
WORKERS = 2  # of each kind
PROMPT_TOKENS = 512
WARM_UP = 50
_TIMEOUT_S = 120.0


class Puppet:
    """Implements WorkerService: first tokens at once, further ones in steps of all attempts."""

    def __init__(self) -> None:
        self.started_at = 0.0  # when the last start was received
        self._going: dict[AttemptId, list[int]] = {}  # next index, end
        self._wake = asyncio.Event()

    async def link(self, stream: Duplex[WorkerMessage, ConductorMessage]) -> None:
        steps = asyncio.create_task(self._step(stream))
        try:
            while True:
                self._take(await stream.receive(), stream)
        except PeerGone:
            return
        finally:
            steps.cancel()
            await asyncio.wait([steps])

    def _take(
        self, message: ConductorMessage, stream: Duplex[WorkerMessage, ConductorMessage]
    ) -> None:
        if isinstance(message, (StartPrefill, StartDecode)):
            self.started_at = time.perf_counter()
            prefills = isinstance(message, StartPrefill)
            first = 1 if isinstance(message, StartDecode) and message.prefill is not None else 0
            end = 1 if prefills else message.task.sampling.max_tokens
            self._going[message.task.attempt] = [first, end]
            self._wake.set()

    async def _step(self, stream: Duplex[WorkerMessage, ConductorMessage]) -> None:
        while True:
            await self._wake.wait()
            outputs = tuple(self._outputs())
            if not self._going:
                self._wake.clear()
            await stream.send(StepReport(outputs, WorkerLoad(running=len(self._going))))
            await asyncio.sleep(0)

    def _outputs(self) -> Iterator[AttemptOutput]:
        for attempt, state in list(self._going.items()):
            index, end = state
            last = index + 1 >= end
            finish = None
            if last:
                del self._going[attempt]
                whole = end > 1 or index >= end
                finish = Finish(FinishReason.LENGTH if whole else FinishReason.HANDED_OFF)
            state[0] += 1
            tokens = (SampledToken(97, index),) if index < end else ()
            yield AttemptOutput(attempt, tokens, finish)


def measure_relay(plan: Plan) -> Iterator[Figure]:
    """On an idle cluster one by one, then many requests at once, then long streams."""
    yield from asyncio.run(_measure())


async def _measure() -> list[Figure]:
    async with MemoryNetwork() as network, asyncio.timeout(_TIMEOUT_S):
        conductor = Conductor(_model(), network.worker_dialer("conductor"), Policy(1e6))
        running = asyncio.create_task(conductor.run())
        await asyncio.sleep(0)
        try:
            await _join(conductor, network)
            return [*await _latency(conductor), *await _throughput(conductor)]
        finally:
            running.cancel()
            await asyncio.wait([running])


async def _latency(conductor: Conductor) -> list[Figure]:
    """Of a request's way in and out, without anything else going on."""
    samples = []
    for number in range(WARM_UP + REQUESTS // 4):
        begin = time.perf_counter()
        await _ask(conductor, number, tokens=2)
        samples.append(time.perf_counter() - begin)
    name = f"{PROMPT_TOKENS}-token prompt, two tokens, alone"
    return list(latencies("relay", name, sorted(samples[WARM_UP:]), ""))


async def _throughput(conductor: Conductor) -> list[Figure]:
    seconds = await _many(conductor, REQUESTS, 2)
    figures = [Figure("relay", "short requests", REQUESTS / seconds, "/s", ">= 300/s")]
    for streams in (STREAMS // 4, STREAMS):
        seconds = await _many(conductor, streams, STREAM_TOKENS, streams)
        rate = streams * STREAM_TOKENS / seconds
        name = f"streamed tokens, {streams} streams"
        figures.append(Figure("relay", name, rate, "/s", ">= 30,000/s"))
    return figures


async def _many(conductor: Conductor, count: int, tokens: int, at_once: int = 32) -> float:
    """Seconds of CPU for `count` requests."""
    places = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with places:
            await _ask(conductor, number, tokens)

    begin = time.process_time()
    await asyncio.gather(*(one(number) for number in range(count)))
    return time.process_time() - begin


async def _ask(conductor: Conductor, number: int, tokens: int) -> None:
    # Token ids: what a tokenizer takes for a text is no part of the relay.
    prompt = tuple((number + at) % 90 + 33 for at in range(PROMPT_TOKENS))
    options = Options(max_tokens=tokens, ignore_eos=True)
    request = await conductor.prepare(Ask(conductor.model.name, (prompt,), options), "bench")
    async with aclosing(conductor.generate(request)) as results:
        async for _ in results:
            pass


async def _join(conductor: Conductor, network: MemoryNetwork) -> None:
    fingerprint = conductor.model.fingerprint or ""
    layout = KvLayout(fingerprint, "bfloat16", 36, 8, 128, 32)
    for number in range(2 * WORKERS):
        role = (Role.PREFILL, Role.DECODE)[number % 2]
        name = f"{role.value}-{number // 2}"
        info = WorkerInfo(
            name=name,
            role=role,
            incarnation="1",
            address=f"{name}:1",
            pid=1,
            model_name="bench",
            layout=layout,
            num_blocks=100_000,
            max_model_len=100_000,
            transport="loopback",
        )
        network.add_worker(info.address, Puppet())
        await conductor.fleet.register(info)
    while not (conductor.ready and len(conductor.fleet.view().live(Role.PREFILL)) == WORKERS):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def _model() -> ServedModel:
    path = demo_model_path()
    spec = load_spec(path)
    return ServedModel("bench", load_tokenizer(path), spec.vocab_size, 100_000, (), "0" * 32)
