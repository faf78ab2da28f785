"""The supervisor with processes that only look like a cluster."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from baton.child import ChildSpec
from baton.cli.report import Reporter
from baton.cli.supervisor import Addresses, ClusterPlan, StartFailed, Supervisor
from tests.unit import fake_cluster

FAKE = str(Path(fake_cluster.__file__))


@dataclass
class Recorder(Reporter):
    """Keeps what it is told instead of printing it."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    on_event: Callable[[str], None] = lambda event: None

    def __post_init__(self) -> None:
        super().__init__(as_json=True, verbose=True)

    def event(self, event: str, text: str, /, **fields: Any) -> None:
        self.events.append((event, fields))
        self.on_event(event)

    def log(self, name: str, line: str) -> None:
        self.lines.append((name, line))

    def names(self) -> list[str]:
        return [event for event, _ in self.events]


def plan(directory: Path, conductor: str = "well", worker: str = "well") -> ClusterPlan:
    def spec(role: str, behaviour: str, name: str) -> ChildSpec:
        argv = (sys.executable, FAKE, role, behaviour, str(directory), name)
        return ChildSpec(name, argv, dict(os.environ))

    return ClusterPlan(
        conductor=lambda listening: spec("conductor", conductor, "conductor"),
        workers=lambda addresses: [spec("worker", worker, f"decode-{i}") for i in range(2)],
        start_timeout_s=20.0,
        drain_timeout_s=10.0,
    )


async def run(
    supervisor: Supervisor, when_ready: Callable[[Addresses], Awaitable[None]] | None = None
) -> None:
    async def stop(addresses: Addresses) -> None:
        supervisor.stop()

    async with asyncio.timeout(60):
        await supervisor.run(when_ready or stop)


def pids(directory: Path) -> list[int]:
    return [int(path.read_text()) for path in directory.iterdir()]


def assert_gone(directory: Path) -> None:
    assert pids(directory)
    for pid in pids(directory):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_starts_everything_then_drains_and_stops_it(tmp_path: Path) -> None:
    recorder = Recorder()
    await run(Supervisor(plan(tmp_path), recorder))
    assert recorder.names()[-3:] == ["draining", "stopping", "stopped"]
    assert recorder.events[-1][1] == {"killed": []}
    done = {fields["name"] for event, fields in recorder.events if event == "done"}
    assert done == {"conductor", "decode-0", "decode-1"}
    assert ("conductor", "WARNING fake conductor drained") in recorder.lines
    assert_gone(tmp_path)


async def test_several_conductors_are_started_and_stopped_together(tmp_path: Path) -> None:
    def second(listening: Addresses | None) -> ChildSpec:
        return replace(one.conductor(listening), name="conductor-1")

    recorder, one = Recorder(), plan(tmp_path)
    seen: list[Addresses] = []
    supervisor = Supervisor(replace(one, more_conductors=(second,)), recorder)

    async def stop(addresses: Addresses) -> None:
        seen.append(addresses)
        supervisor.stop()

    await run(supervisor, stop)
    assert len({each.http for each in seen[0].all}) == 2
    assert seen[0].urls == ",".join(each.url for each in seen[0].all)
    done = [fields["name"] for event, fields in recorder.events if event == "done"]
    assert sorted(done) == ["conductor", "conductor-1", "decode-0", "decode-1"]
    drained = [name for name, line in recorder.lines if "fake conductor drained" in line]
    assert sorted(drained) == ["conductor", "conductor-1"]
    assert_gone(tmp_path)


async def test_a_worker_that_cannot_start_is_blamed_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(StartFailed) as failure:
        await run(Supervisor(plan(tmp_path, worker="dies"), Recorder()))
    assert "decode-" in failure.value.message
    assert "ended with exit code 1" in failure.value.message
    assert "the fake reason why it cannot start" in failure.value.message


async def test_a_conductor_that_cannot_start_ends_everything(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(StartFailed, match="conductor ended with exit code 1"):
        await run(Supervisor(plan(tmp_path, conductor="dies"), recorder))
    assert "draining" not in recorder.names()


async def test_a_silent_conductor_meets_a_deadline(tmp_path: Path) -> None:
    silent = plan(tmp_path, conductor="silent")
    short = ClusterPlan(silent.conductor, silent.workers, start_timeout_s=0.5)
    with pytest.raises(StartFailed, match="did not say its address"):
        await run(Supervisor(short, Recorder()))


async def test_a_worker_that_dies_later_is_started_again(tmp_path: Path) -> None:
    assert await events_of_a_kill(tmp_path, "decode-1") == [
        ("process_exited", {"name": "decode-1", "code": -signal.SIGKILL}),
        ("process_live", {"name": "decode-1", "pid": int((tmp_path / "decode-1").read_text())}),
    ]
    assert_gone(tmp_path)


async def test_a_conductor_that_dies_later_is_started_again(tmp_path: Path) -> None:
    died, live = await events_of_a_kill(tmp_path, "conductor")
    assert died == ("process_exited", {"name": "conductor", "code": -signal.SIGKILL})
    assert (live[0], live[1]["name"]) == ("process_live", "conductor")
    assert_gone(tmp_path)


async def events_of_a_kill(directory: Path, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Between when everything is ready and when the killed process is live again."""
    recorder = Recorder()
    supervisor = Supervisor(plan(directory), recorder)
    recorder.on_event = lambda event: supervisor.stop() if event == "process_live" else None

    async def kill(addresses: Addresses) -> None:
        (pid,) = [
            fields["pid"]
            for event, fields in recorder.events
            if event == "done" and fields["name"] == name
        ]
        recorder.events.clear()
        os.kill(pid, signal.SIGKILL)

    await run(supervisor, kill)
    return recorder.events[: recorder.names().index("process_live") + 1]


async def test_a_signal_stops_and_a_second_one_hurries(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.on_event = lambda event: (
        os.kill(os.getpid(), signal.SIGTERM) if event == "stopping" else None
    )
    supervisor = Supervisor(plan(tmp_path, worker="stubborn"), recorder)

    async def interrupt(addresses: Addresses) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    started = asyncio.get_running_loop().time()
    await run(supervisor, interrupt)
    assert recorder.events[-1] == ("stopped", {"killed": ["decode-0", "decode-1"]})
    assert asyncio.get_running_loop().time() - started < 30
    assert_gone(tmp_path)


async def test_a_signal_while_starting_stops_quietly(tmp_path: Path) -> None:
    recorder = Recorder()
    supervisor = Supervisor(plan(tmp_path, conductor="silent"), recorder)
    recorder.on_event = lambda event: supervisor.stop() if event == "progress" else None
    await run(supervisor)
    assert recorder.names()[-2:] == ["stopping", "stopped"]
    assert "draining" not in recorder.names()


async def test_cancelling_leaves_no_process(tmp_path: Path) -> None:
    ready = asyncio.Event()

    async def wait(addresses: Addresses) -> None:
        ready.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(run(Supervisor(plan(tmp_path), Recorder()), wait))
    async with asyncio.timeout(60):
        await ready.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_gone(tmp_path)
