"""A short profile of one step: which operations its time goes to, and how long the device waits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from baton.bench.engine_cost import Chunk
from baton.bench.engine_device import Device
from baton.bench.engine_phases import OnFigure
from baton.bench.engine_rig import Rig, run
from baton.engine.batch import Batch
from baton.engine.native_runner import NativeRunner

_LINES = 12
_STEPS = 4


@dataclass(frozen=True, slots=True)
class Line:
    """One operation or kernel: its own time in one step, without what it calls."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one step, under the profiler, which slows the host down. `busy_s` is the time in which
    something was computed; on CUDA, the rest of `step_s` are gaps between kernels."""

    name: str
    step_s: float
    busy_s: float
    lines: tuple[Line, ...]  # longest first; the rest is left out


def measure_profiles(
    rig: Rig, device: Device, steps: Sequence[Sequence[Chunk]], on_figure: OnFigure
) -> tuple[Profile, ...]:
    """Each step several times in a row. Steps that do not fit into the pool are left out."""
    profiles = []
    for step in steps:
        if rig.blocks(step) <= rig.num_blocks:
            name = f"step of {len(step)} x {step[0].tokens} after {step[0].start} tokens"
            on_figure(f"profile of a {name}")
            profiles.append(_profile(rig, device, step, name))
    return tuple(profiles)


def operation_seconds(runner: NativeRunner, batches: Sequence[Batch]) -> dict[str, float]:
    """Of the first thread in one of the batches, by operation, by the native counters."""
    runner.profile()  # what was counted before
    run(runner, batches)
    return {name: value / len(batches) for name, value in runner.profile().seconds.items()}


def _profile(rig: Rig, device: Device, step: Sequence[Chunk], name: str) -> Profile:
    batches = [rig.batch(step)] * _STEPS
    run(rig.runner, batches[:1])
    if isinstance(rig.runner, NativeRunner):
        return _native_profile(rig.runner, batches, name)
    activities = [ProfilerActivity.CPU]
    if device.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        run(rig.runner, batches)
        device.sync()
        step_s = (time.perf_counter() - start) / _STEPS
    lines = sorted(_lines(profiler, device), key=lambda line: -line.seconds)
    busy_s = sum(line.seconds for line in lines)
    return Profile(name, step_s, min(busy_s, step_s), tuple(lines[:_LINES]))


def _lines(profiler: profile, device: Device) -> Iterator[Line]:
    """Kernels on CUDA, where operations of the host would count their time again."""
    for event in profiler.key_averages():
        if device.is_cuda and event.device_type.name != "CUDA":
            continue
        spent = event.self_device_time_total if device.is_cuda else event.self_cpu_time_total
        yield Line(event.key, event.count / _STEPS, spent * 1e-6 / _STEPS)


def _native_profile(runner: NativeRunner, batches: Sequence[Batch], name: str) -> Profile:
    start = time.perf_counter()
    seconds = operation_seconds(runner, batches)
    step_s = (time.perf_counter() - start) / len(batches)
    lines = [Line(operation, 1, value) for operation, value in seconds.items()]
    busy_s = sum(value for operation, value in seconds.items() if operation != "waiting")
    lines.append(Line("outside of the library", 1, max(0.0, step_s - sum(seconds.values()))))
    return Profile(name, step_s, busy_s, tuple(sorted(lines, key=lambda line: -line.seconds)))
