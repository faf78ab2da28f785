"""What keeps large simulations small: timers nobody waits for, requests that are yet to come."""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections.abc import Callable
from typing import cast

from sim.fleet.cpu import CONDUCTOR, SIMULATOR, WORKERS, CpuMeter, whose
from sim.fleet.flags import add_trace_flags, stream_of, workload_of
from sim.loop import CANCELLED_TIMERS, SimLoop
from sim.workload.make import made_by


def test_cancelled_timers_do_not_wait_for_their_time() -> None:
    loop = SimLoop()
    rang: list[float] = []
    left: list[int] = []
    try:
        for late_s in (3.0, 1.0, 2.0):
            loop.call_later(late_s, lambda: rang.append(loop.time()))
        for _ in range(CANCELLED_TIMERS + 1):
            loop.call_later(600.0, rang.clear).cancel()
        loop.call_later(2.5, lambda: left.append(len(loop._scheduled)))
        loop.call_later(4.0, loop.stop)
        loop.run_forever()
    finally:
        loop.close()
    assert rang == [1.0, 2.0, 3.0]
    assert left == [2]  # those of 3 and 4 seconds


def test_few_cancelled_timers_are_left_alone() -> None:
    loop = SimLoop()
    try:
        for _ in range(10):
            loop.call_later(600.0, print).cancel()
        loop.call_later(1.0, loop.stop)
        loop.run_forever()
        assert len(loop._scheduled) == 10
        loop.call_later(601.0, loop.stop)
        loop.run_forever()
        assert loop._timer_cancelled_count == 0
    finally:
        loop.close()


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_trace_flags(parser, or_make=True)
    return parser.parse_args(words)


def test_generated_requests_come_as_they_are_asked_for() -> None:
    words = "prefixes --requests 1000000000 --rate 5 --seed 3"
    asked = options("--make", words, "--speed", "2")
    requests, count = stream_of(asked)
    first = next(requests)
    (wanted,) = itertools.islice(made_by(words), 1)
    assert (first.at_s, first.blocks) == (wanted.at_s / 2, wanted.blocks)
    assert count == 1_000_000_000
    assert workload_of(asked, count)["trace"] == words


def test_the_first_of_them_are_as_many_as_are_asked_for() -> None:
    requests, count = stream_of(options("--make", "plain --requests 50", "--first", "7"))
    assert (len(list(requests)), count) == (7, 7)
    requests, count = stream_of(options("--make", "plain --requests 5", "--first", "7"))
    assert (len(list(requests)), count) == (5, 5)


def test_cpu_time_is_whose_code_runs_or_has_called() -> None:
    def inside(*modules: str) -> str:
        """Called by the first of them, which calls the next."""
        found: Callable[[], str] = lambda: whose(sys._getframe())  # noqa: E731
        for module in reversed(modules):
            scope = {"__name__": module, "inner": found}
            exec("def run(): return inner()", scope)
            found = cast(Callable[[], str], scope["run"])
        return found()

    assert inside("sim.loop", "asyncio.events") == SIMULATOR
    assert inside("sim.loop", "prefill_worker.service", "asyncio.tasks") == WORKERS
    assert inside("sim.loop", "conductor.fleet", "baton.rpc.memory") == CONDUCTOR
    assert inside("sim.loop", "baton.rpc.memory", "conductor.fleet") == CONDUCTOR


def test_counting_ends_with_the_last_request() -> None:
    cpu = CpuMeter(3)
    assert list(cpu.watch(made_by("plain --requests 3"))) == list(made_by("plain --requests 3"))
    cpu.note(2)
    cpu.note(3)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    told = cpu.describe()
    cpu.stop()
    assert cpu.describe() == told
