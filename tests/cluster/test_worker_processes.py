"""Real prefill and decode worker processes; the test plays the conductor."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from baton.rpc.grpc_client import GrpcWorkerDialer
from baton.rpc.grpc_server import RpcServer
from baton.types.fleet import BlockState, FleetLease, Peer, WorkerInfo, WorkerLoad
from baton.types.link import Cancel, StartDecode, StartPrefill
from baton.types.request import AttemptId, FinishReason, GenerationTask, SamplingParams
from tests.models import make_tiny_model
from tests.unit.worker_rig import Conductor

pytestmark = [pytest.mark.cluster]

TOKEN = "cluster-test"
START_S = 60.0
END_S = 20.0


@dataclass
class Fleet:
    """A FleetService that takes everybody in."""

    workers: dict[str, WorkerInfo] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def register(self, info: WorkerInfo) -> FleetLease:
        self.workers[info.name] = info
        self.changed.set()
        return FleetLease(True, 0.9)

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease:
        return FleetLease(True, 0.9)

    async def leave(self, name: str, incarnation: str) -> None:
        self.left.add(name)
        self.changed.set()

    async def found(self, name: str) -> WorkerInfo:
        await self.until(lambda: name in self.workers)
        return self.workers[name]

    async def gone(self, name: str) -> None:
        await self.until(lambda: name in self.left)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(START_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@dataclass
class Worker:
    process: asyncio.subprocess.Process
    info: WorkerInfo
    conductor: Conductor

    @property
    def peer(self) -> Peer:
        return Peer(self.info.name, self.info.incarnation, self.info.address)

    async def until_idle(self) -> None:
        """Every block is free or cached, says the last report or renewal."""
        settled = (BlockState.FREE, BlockState.CACHED)

        def idle() -> bool:
            loads = self.conductor.loads
            return bool(loads) and loads[-1].blocks_in(*settled) == self.info.num_blocks

        await self.conductor.until(idle)

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), END_S)


@dataclass
class Cluster:
    fleet: Fleet
    address: str
    model: Path
    group: asyncio.TaskGroup

    async def start(self, role: str, name: str, *flags: str) -> Worker:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"{role}_worker", "--name", name, "--threads", "1"),
            *("--model", str(self.model), "--conductor", self.address, "--exit-with-parent"),
            *("--num-blocks", "128", "--dtype", "float32", *flags),
            stdin=asyncio.subprocess.PIPE,
            env={**os.environ, "BATON_CLUSTER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"},
        )
        try:
            info = await self.fleet.found(name)
        except BaseException:
            process.kill()
            await process.wait()
            raise
        assert info.pid == process.pid
        conductor = Conductor(await GrpcWorkerDialer(TOKEN).link(info.address, 5.0))
        self.group.create_task(conductor.listen())
        return Worker(process, info, conductor)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model("qwen3", path)
    return path


@asynccontextmanager
async def cluster(model: Path) -> AsyncIterator[Cluster]:
    fleet = Fleet()
    server = RpcServer("127.0.0.1:0", TOKEN)
    server.add_fleet(fleet)
    address = await server.start()
    async with asyncio.TaskGroup() as group:
        yield Cluster(fleet, address, model, group)
    await server.stop(0.1)


@asynccontextmanager
async def one_pair(model: Path, *flags: str) -> AsyncIterator[tuple[Cluster, Worker, Worker]]:
    """1P1D; whatever is still running at the end is stopped in order."""
    async with cluster(model) as running:
        workers = await asyncio.gather(
            running.start("prefill", "prefill", *flags), running.start("decode", "decode", *flags)
        )
        try:
            yield running, *workers
        finally:
            for worker in workers:
                if worker.process.returncode is None:
                    worker.process.terminate()
            for worker in workers:
                await worker.ended()
                await worker.conductor.stream.aclose()


def make_task(name: str, prompt_len: int, max_tokens: int = 12, seed: int = 0) -> GenerationTask:
    prompt = tuple(4 + (seed * 31 + i * i) % 370 for i in range(prompt_len))
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    drawn = SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=seed, ignore_eos=True)
    return GenerationTask(AttemptId(name), prompt, drawn if seed % 2 else greedy)


async def begin(prefill: Worker, decode: Worker, task: GenerationTask) -> None:
    await prefill.conductor.send(StartPrefill(task))
    await decode.conductor.send(StartDecode(task, prefill.peer))


def split_answer(prefill: Worker, decode: Worker, attempt: AttemptId) -> list[int]:
    return prefill.conductor.answer(attempt) + decode.conductor.answer(attempt)


async def test_a_pair_of_workers_from_start_to_shutdown(model: Path) -> None:
    async with one_pair(model) as (running, prefill, decode):
        await split_and_colocated_answers_are_equal(prefill, decode)
        await cancel_frees_every_block(prefill, decode)
        await idle_workers_burn_nothing(prefill, decode)
        assert running.fleet.left == set()
        for worker in (prefill, decode):
            worker.process.terminate()
            assert await worker.ended() == 0
        assert running.fleet.left == {"prefill", "decode"}


async def split_and_colocated_answers_are_equal(prefill: Worker, decode: Worker) -> None:
    lengths = [1, 31, 32, 33, 100, 257, 500, 64]
    split = [make_task(f"split{n}", size, seed=n) for n, size in enumerate(lengths)]
    alone = [make_task(f"alone{n}", size, seed=n) for n, size in enumerate(lengths)]
    for task in split:
        await begin(prefill, decode, task)
    for task in split:
        finish = await prefill.conductor.finish(task.attempt)
        assert finish.reason is FinishReason.HANDED_OFF
        finish = await decode.conductor.finish(task.attempt)
        assert finish.reason is FinishReason.LENGTH
    for one, other in zip(split, alone, strict=True):
        await decode.conductor.send(StartDecode(other))
        await decode.conductor.finish(other.attempt)
        answer = decode.conductor.answer(other.attempt)
        assert len(answer) == 12
        assert split_answer(prefill, decode, one.attempt) == answer
    await prefill.until_idle()
    await decode.until_idle()


async def cancel_frees_every_block(prefill: Worker, decode: Worker) -> None:
    tasks = [make_task(f"cancelled{n}", 400, 1000, seed=n) for n in range(4)]
    for task in tasks:
        await begin(prefill, decode, task)
    await decode.conductor.token(tasks[0].attempt)  # decoding has begun
    for task in tasks:
        for worker in (prefill, decode):
            await worker.conductor.send(Cancel(task.attempt, "test"))
    for task in tasks:
        await prefill.conductor.finish(task.attempt)
        finish = await decode.conductor.finish(task.attempt)
        assert finish.reason in (FinishReason.CANCELLED, FinishReason.ERROR)
    await prefill.until_idle()
    await decode.until_idle()


async def idle_workers_burn_nothing(*workers: Worker) -> None:
    """CPU time over a stretch of wall time: a spinning worker would use all of it."""
    before = [cpu_seconds(worker) for worker in workers]
    await asyncio.sleep(2.0)
    after = [cpu_seconds(worker) for worker in workers]
    assert max(now - then for now, then in zip(after, before, strict=True)) < 0.3


async def test_a_killed_prefill_worker_is_a_retryable_error_and_frees_blocks(
    model: Path,
) -> None:
    async with one_pair(model, "--max-batch-tokens", "64") as (_, prefill, decode):
        warm = make_task("warm", 40)
        await begin(prefill, decode, warm)
        await decode.conductor.finish(warm.attempt)
        tasks = [make_task(f"t{n}", 2000, seed=n) for n in range(6)]
        for task in tasks:
            await begin(prefill, decode, task)
        prefill.process.send_signal(signal.SIGKILL)
        await prefill.ended()
        errors = 0
        for task in tasks:
            finish = await decode.conductor.finish(task.attempt)
            if finish.error is not None:
                errors += 1
                assert finish.error.retryable
        assert errors
        await decode.until_idle()
        alone = make_task("alone", 40, seed=1)  # and it still works
        await decode.conductor.send(StartDecode(alone))
        assert (await decode.conductor.finish(alone.attempt)).reason is FinishReason.LENGTH
        assert decode.process.stdin is not None
        decode.process.stdin.close()  # what the end of its parent looks like
        await decode.ended()


async def test_shutdown_drains_and_a_second_signal_does_not_wait(model: Path) -> None:
    async with cluster(model) as running:
        patient, hasty = await asyncio.gather(
            *(running.start("decode", name, "--transport", "shm") for name in ("a", "b"))
        )
        short, long = make_task("short", 20, 200), make_task("long", 20, 2000)
        await patient.conductor.send(StartDecode(short))
        await hasty.conductor.send(StartDecode(long))
        await patient.conductor.token(short.attempt)
        await hasty.conductor.token(long.attempt)
        for worker in (patient, hasty):
            worker.process.terminate()
        await running.fleet.gone("b")
        hasty.process.terminate()
        finish = await hasty.conductor.finish(long.attempt)
        assert finish.error is not None
        assert (finish.error.code, finish.error.retryable) == ("worker_lost", True)
        finish = await patient.conductor.finish(short.attempt)
        assert finish.reason is FinishReason.LENGTH
        assert len(patient.conductor.answer(short.attempt)) == 200
        for worker in (patient, hasty):
            assert await worker.ended() == 0
            await worker.conductor.stream.aclose()


def cpu_seconds(worker: Worker) -> float:
    """User and system time of the process, all threads."""
    fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
