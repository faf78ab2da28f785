"""Workers without a model, for conductor tests: they speak the real link and answer from a script.

A prefill worker and a decode worker of the same attempt meet through a `Meeting`, which stands for
the handoff: the decode worker goes on once the prefill worker has the first token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from baton.errors import PeerGone
from baton.rpc.memory import MemoryNetwork
from baton.rpc.services import Duplex
from baton.tokenizer import Tokenizer, TokenizerConfig
from baton.types.fleet import BlockState, KvLayout, Role, WorkerInfo, WorkerLoad
from baton.types.kv_events import KvEvents, KvSnapshot
from baton.types.link import (
    Cancel,
    ConductorMessage,
    Resync,
    SetRole,
    StartDecode,
    StartPrefill,
    StepReport,
    WorkerMessage,
)
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    GenerationTask,
    SampledToken,
    Span,
    TokenLogprob,
    WireError,
)
from conductor.cluster import ConductorIdentity
from conductor.config import ConductorConfig
from conductor.server import Server
from conductor.service import Conductor, Policy, ServedModel

EOS = 256
NUM_TOKENS = 259
BLOCK_SIZE = 16
FINGERPRINT = "f" * 32
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    """Byte-level: the id of a byte is the byte; 256 = <|end|> (eos), 257 and 258 special."""
    stand_ins = bytes_to_chars()
    vocab = {stand_ins[byte]: byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|start|>", "<|begin|>"])
    special = {"eos_token": "<|end|>", "bos_token": "<|begin|>"}
    return Tokenizer(backend, TokenizerConfig(special, CHAT_TEMPLATE))


def bytes_to_chars() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def tiny_model(name: str = "tiny") -> ServedModel:
    return ServedModel(name, tiny_tokenizer(), NUM_TOKENS, 512, (EOS,), FINGERPRINT)


@dataclass(frozen=True)
class Script:
    """What a worker answers. With `hang_at` it stops before that output index until cancelled;
    with `error_at` it fails there. A prompt takes `prefill_s`. A resumed task gets the rest."""

    tokens: tuple[int, ...]
    finish: FinishReason = FinishReason.STOP
    hang_at: int | None = None
    error_at: int | None = None
    error: WireError = field(default_factory=lambda: WireError("internal_error", "a bug"))
    cached_tokens: int = 0
    prefill_s: float = 0.0


Scripts = Callable[[GenerationTask], Script]


def say(text: str | bytes, **options: object) -> Scripts:
    """Answer with these bytes and an end-of-sequence token."""
    raw = text.encode() if isinstance(text, str) else text
    return lambda task: Script((*raw, EOS), **options)  # type: ignore[arg-type]


def echo(task: GenerationTask) -> Script:
    """Answer with the prompt."""
    return Script((*task.prompt, EOS))


def layout(**changes: object) -> KvLayout:
    values = {"model": FINGERPRINT, "dtype": "float32", "num_layers": 2, "kv_heads": 1}
    values |= {"head_dim": 4, "block_size": BLOCK_SIZE}
    return KvLayout(**(values | changes))  # type: ignore[arg-type]


def worker_info(name: str, role: Role, **changes: object) -> WorkerInfo:
    values: dict[str, object] = {
        "name": name,
        "role": role,
        "incarnation": f"{name}-life-1",
        "address": f"{name}:1",
        "pid": 4242,
        "model_name": "tiny",
        "layout": layout(),
        "num_blocks": 32,
        "max_model_len": 512,
        "transport": "loopback",
    }
    return WorkerInfo(**(values | changes))  # type: ignore[arg-type]


class Meeting:
    """Where the two workers of an attempt wait for each other."""

    def __init__(self) -> None:
        self._events: dict[tuple[AttemptId, str], asyncio.Event] = {}

    def event(self, attempt: AttemptId, name: str) -> asyncio.Event:
        return self._events.setdefault((attempt, name), asyncio.Event())


class FakeWorker:
    """Implements WorkerService. `live` holds the attempts that it has blocks for."""

    def __init__(self, info: WorkerInfo, script: Scripts, meeting: Meeting) -> None:
        self.info = info
        self.script = script
        self.meeting = meeting
        self.live: set[AttemptId] = set()
        self.tasks: list[GenerationTask] = []
        self.starts: list[StartPrefill | StartDecode] = []
        self.resyncs = 0
        self.wanted: list[Role] = []  # that it was asked to be
        self.snapshot: KvSnapshot | None = None  # the answer to a Resync
        self.cancelled: list[AttemptId] = []
        self.links: list[Duplex[WorkerMessage, ConductorMessage]] = []

    async def link(self, stream: Duplex[WorkerMessage, ConductorMessage]) -> None:
        self.links.append(stream)
        work: dict[AttemptId, asyncio.Task[None]] = {}
        try:
            while True:
                message = await stream.receive()
                if isinstance(message, (StartPrefill, StartDecode)):
                    attempt = message.task.attempt
                    self.tasks.append(message.task)
                    self.starts.append(message)
                    self.live.add(attempt)
                    work[attempt] = asyncio.create_task(self._work(stream, message))
                    await asyncio.sleep(0)  # a task that never began could not clean up
                elif isinstance(message, Resync):
                    self.resyncs += 1
                    if self.snapshot is not None:
                        await stream.send(self.snapshot)
                elif isinstance(message, SetRole):
                    self.wanted.append(message.role)
                elif isinstance(message, Cancel):
                    self.cancelled.append(message.attempt)
                    if message.attempt in self.live:
                        work[message.attempt].cancel()
        except PeerGone:
            for task in work.values():
                task.cancel()
        finally:
            await asyncio.gather(*work.values(), return_exceptions=True)

    async def tell(self, message: KvEvents | KvSnapshot) -> None:
        """To the conductor of the last link."""
        await self.links[-1].send(message)

    def load(self) -> WorkerLoad:
        used = len(self.live)
        blocks = ((BlockState.FREE, self.info.num_blocks - used), (BlockState.ACTIVE, used))
        return WorkerLoad(running=used, blocks=blocks)

    async def _work(
        self,
        stream: Duplex[WorkerMessage, ConductorMessage],
        message: StartPrefill | StartDecode,
    ) -> None:
        attempt = message.task.attempt
        script = self.script(message.task)
        try:
            if isinstance(message, StartPrefill):
                finish = await self._prefill(stream, message.task, script)
            else:
                finish = await self._decode(stream, message, script)
        except asyncio.CancelledError:
            finish = Finish(FinishReason.CANCELLED, cached_tokens=script.cached_tokens)
        self.live.discard(attempt)
        await self._report(stream, AttemptOutput(attempt, finish=finish))

    async def _prefill(
        self,
        stream: Duplex[WorkerMessage, ConductorMessage],
        task: GenerationTask,
        script: Script,
    ) -> Finish:
        tokens, reason = _limited(task, script)
        first = len(task.output)
        began = asyncio.get_running_loop().time()
        if script.prefill_s:
            await asyncio.sleep(script.prefill_s)
        if (failure := await self._reach(script, first)) is not None:
            return failure
        ended = asyncio.get_running_loop().time()
        sampled = _sampled(task, tokens[first], first)
        await self._report(stream, AttemptOutput(task.attempt, (sampled,)))
        if len(tokens) == first + 1:
            self.meeting.event(task.attempt, "finished").set()
            self.meeting.event(task.attempt, "prefilled").set()
            return Finish(reason, cached_tokens=script.cached_tokens)
        self.meeting.event(task.attempt, "prefilled").set()
        await self.meeting.event(task.attempt, "released").wait()
        spans = (Span("prefill", began, ended),)
        return Finish(FinishReason.HANDED_OFF, None, script.cached_tokens, spans)

    async def _decode(
        self,
        stream: Duplex[WorkerMessage, ConductorMessage],
        message: StartDecode,
        script: Script,
    ) -> Finish:
        task, first = message.task, len(message.task.output)
        if message.prefill is not None:
            await self.meeting.event(task.attempt, "prefilled").wait()
            if self.meeting.event(task.attempt, "finished").is_set():
                return Finish(FinishReason.CANCELLED)
            self.meeting.event(task.attempt, "released").set()
            first += 1
        tokens, reason = _limited(task, script)
        for index in range(first, len(tokens)):
            if (failure := await self._reach(script, index)) is not None:
                return failure
            output = AttemptOutput(task.attempt, (_sampled(task, tokens[index], index),))
            await self._report(stream, output)
        spans = (Span("decode", 2.0, 3.0),)
        return Finish(reason, None, script.cached_tokens, spans)

    async def _reach(self, script: Script, index: int) -> Finish | None:
        if script.error_at == index:
            return Finish(FinishReason.ERROR, script.error)
        if script.hang_at == index:
            await asyncio.Event().wait()
        return None

    async def _report(
        self, stream: Duplex[WorkerMessage, ConductorMessage], output: AttemptOutput
    ) -> None:
        try:
            await stream.send(StepReport((output,), self.load()))
        except PeerGone:
            return


def _limited(task: GenerationTask, script: Script) -> tuple[tuple[int, ...], FinishReason]:
    tokens, limit = script.tokens, task.sampling.max_tokens
    if EOS in tokens and not task.sampling.ignore_eos:
        tokens = tokens[: tokens.index(EOS) + 1]
    if len(tokens) > limit:
        return tokens[:limit], FinishReason.LENGTH
    return tokens, script.finish


def _sampled(task: GenerationTask, token_id: int, index: int) -> SampledToken:
    wanted = task.sampling.logprobs
    if wanted is None:
        return SampledToken(token_id, index)
    top = tuple(((token_id + i) % NUM_TOKENS, -0.5 - i) for i in range(wanted))
    return SampledToken(token_id, index, TokenLogprob(-0.5, top))


@dataclass
class FakeCluster:
    """A conductor (with or without its servers) and its fake workers."""

    conductor: Conductor
    network: MemoryNetwork
    workers: dict[str, FakeWorker]
    http: str = ""  # host:port
    grpc: str = ""
    server: Server | None = None

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    async def add(self, role: Role, name: str, script: Scripts, **changes: object) -> FakeWorker:
        info = worker_info(name, role, **changes)
        meeting = next(iter(self.workers.values())).meeting if self.workers else Meeting()
        worker = FakeWorker(info, script, meeting)
        self.network.add_worker(info.address, worker)
        self.workers[name] = worker
        await self.conductor.fleet.register(info)
        await wait_for(lambda: bool(worker.links))
        return worker

    async def check_nothing_left(self) -> None:
        """Every block is free again, and the conductor has forgotten every attempt."""
        await wait_for(lambda: not any(worker.live for worker in self.workers.values()))
        await wait_for(lambda: self.conductor.running == 0)
        views = self.conductor.fleet.view().workers
        assert all(view.own_attempts == 0 and view.own_prompt_tokens == 0 for view in views)
        assert len(self.conductor._dispatcher.placer.expected) == 0
        async with asyncio.timeout(5):
            await self.conductor.admission.wait_idle()


async def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (plain conditions have no event)
            await asyncio.sleep(0.001)


@asynccontextmanager
async def fake_cluster(
    script: Scripts = echo,
    prefill: int = 1,
    decode: int = 1,
    policy: Policy | None = None,
) -> AsyncIterator[FakeCluster]:
    """The conductor's core and workers, without sockets (so it also runs in virtual time)."""
    async with MemoryNetwork() as network:
        conductor = Conductor(
            tiny_model(), network.worker_dialer("conductor"), policy or Policy(lease_ttl_s=1e6)
        )
        running = asyncio.create_task(conductor.run())
        try:
            await asyncio.sleep(0)
            cluster = FakeCluster(conductor, network, {})
            await add_workers(cluster, script, prefill, decode)
            yield cluster
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def add_workers(cluster: FakeCluster, script: Scripts, prefill: int, decode: int) -> None:
    for number in range(prefill):
        await cluster.add(Role.PREFILL, f"prefill-{number}", script)
    for number in range(decode):
        await cluster.add(Role.DECODE, f"decode-{number}", script)


@asynccontextmanager
async def fake_server(
    script: Scripts = echo, prefill: int = 1, decode: int = 1, **config: object
) -> AsyncIterator[FakeCluster]:
    """A whole conductor on loopback ports, with fake workers behind it; checks that nothing is
    left when the test is done."""
    options = {"port": 0, "grpc_port": 0, "lease_ttl": 1e6, "drain_timeout": 0.0} | config
    async with MemoryNetwork() as network:
        dialer = network.worker_dialer("conductor")
        server = Server(ConductorConfig(**options), tiny_model(), "secret", dialer)  # type: ignore[arg-type]
        cluster = FakeCluster(server.conductor, network, {}, server=server)
        listening = asyncio.Event()

        def on_listening(identity: ConductorIdentity) -> None:
            cluster.http, cluster.grpc = identity.http, identity.grpc
            listening.set()

        running = asyncio.create_task(server.run(on_listening))
        try:
            async with asyncio.timeout(10):
                await listening.wait()
            await add_workers(cluster, script, prefill, decode)
            yield cluster
            await cluster.check_nothing_left()
        finally:
            server.stop()
            await running
