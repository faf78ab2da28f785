"""`baton bench engine`: one engine next to what its machine could do.

Ceilings first (how fast this machine multiplies and reads), then prefill and decode through the
real runner, every kernel by itself, the time between the steps of a real engine, and the ceilings
again. Shares are of the better of the two measurements of each ceiling.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from baton.bench.engine_ceilings import Ceilings, measure_ceilings
from baton.bench.engine_cost import Chunk
from baton.bench.engine_device import Device, find_device
from baton.bench.engine_kernels import KernelPlan, measure_kernels, measure_native
from baton.bench.engine_loop import LoopTiming, measure_loop
from baton.bench.engine_models import shape_named, write_random_model
from baton.bench.engine_options import Options
from baton.bench.engine_phases import (
    Figure,
    OnFigure,
    Plan,
    measure_decodes,
    measure_mixed,
    measure_prefills,
)
from baton.bench.engine_profile import Profile, measure_profiles
from baton.bench.engine_rig import Model, find_model, open_rig
from baton.errors import ConfigError
from baton.model.hub import resolve_model
from baton.model.native_decoder import why_not_native

_CPU_KV_BYTES = 4 << 30
_WORKSPACE_BYTES = 6 << 30  # on a GPU: activations, and whatever kernels take
_MOVED = 0.10  # ceilings that move by more say that the machine had other work


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured; parts that were not asked for are empty."""

    options: Options
    model: str
    device: str
    dtype: str
    weight_bytes: int  # that a step reads
    kv_token_bytes: int
    before: Ceilings
    after: Ceilings
    prefills: tuple[Figure, ...] = ()
    decodes: tuple[Figure, ...] = ()
    mixed: tuple[Figure, ...] = ()
    kernels: tuple[Figure, ...] = ()
    loops: tuple[LoopTiming, ...] = ()
    profiles: tuple[Profile, ...] = ()

    @property
    def ceilings(self) -> Ceilings:
        """What shares are computed with."""
        return self.before.best(self.after)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"the ceiling of {name} moved by {ratio - 1:+.0%} during the run: the machine has "
            "other work, or changes its clocks"
            for name, ratio in self.before.moved(self.after).items()
            if abs(ratio - 1) > _MOVED
        )


def run(options: Options, on_figure: OnFigure) -> Report:
    """Takes minutes. `on_figure` is told what is being measured.

    Raises ConfigError for options that do not fit together and ModelLoadError.
    """
    if options.model is not None and options.shape is not None:
        raise ConfigError("give a model or --shape, not both")
    device = find_device(options.device, options.threads)
    with _directory(options, on_figure) as directory:
        model = find_model(directory, device, options.dtype, options.block_size)
        return _measure(options, model, device, on_figure)


@contextmanager
def _directory(options: Options, on_figure: OnFigure) -> Iterator[Path]:
    if options.shape is None:
        yield resolve_model(options.model)
        return
    shape = shape_named(options.shape)
    on_figure("writing random weights")
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:
        yield write_random_model(shape, Path(directory))


def _measure(options: Options, model: Model, device: Device, on_figure: OnFigure) -> Report:
    plan = _plan(options, model, device)
    on_figure("ceilings")
    budget_s = 0.05 if options.quick else 0.5
    before = measure_ceilings(device, model.layout.dtype, budget_s, options.quick)
    report = Report(
        options=options,
        model=options.shape or options.model or "demo",
        device=device.describe(),
        dtype=model.layout.dtype,
        weight_bytes=model.cost.weight_bytes(),
        kv_token_bytes=model.cost.kv_token_bytes,
        before=before,
        after=before,
    )
    native = options.kernels in ("auto", "native") and not why_not_native(
        model.spec, device.name, model.layout.dtype
    )
    if native or set(options.parts) != {"kernels"}:
        # In a thread of its own, as in an engine: a native runner pins the thread that calls it.
        with ThreadPoolExecutor(1) as thread:
            arguments = (report, model, device, plan, on_figure)
            report = thread.submit(_through_the_runner, *arguments).result()
    if "kernels" in options.parts and not native:
        # By themselves: the weights are loaded again, and the runner's are gone by now.
        kernel_plan = _kernel_plan(options, plan, device)
        kernels = measure_kernels(model, device, kernel_plan, options.kernels, on_figure)
        report = replace(report, kernels=kernels)
    on_figure("ceilings again")
    after = measure_ceilings(device, model.layout.dtype, budget_s, options.quick)
    return replace(report, after=after)


def _through_the_runner(
    report: Report, model: Model, device: Device, plan: Plan, on_figure: OnFigure
) -> Report:
    options, parts = report.options, report.options.parts
    on_figure("loading")
    with open_rig(model, device, plan.blocks(model), options.kernels) as rig:
        if "prefill" in parts:
            prefills = measure_prefills(rig, plan, report.before, on_figure)
            report = replace(report, prefills=prefills)
        if "decode" in parts:
            report = replace(report, decodes=measure_decodes(rig, plan, report.before, on_figure))
        if "mixed" in parts:
            report = replace(report, mixed=measure_mixed(rig, plan, report.before, on_figure))
        if "profile" in parts:
            profiles = measure_profiles(rig, device, _profiled(plan), on_figure)
            report = replace(report, profiles=profiles)
        if "loop" in parts:
            steps = 16 if options.quick else 64
            loops = measure_loop(rig, (1, 8, 32, 128), steps, on_figure)
            report = replace(report, loops=loops)
        if "kernels" in parts:
            kernel_plan = _kernel_plan(options, plan, device)
            report = replace(report, kernels=measure_native(rig, kernel_plan, on_figure))
    return report


def _plan(options: Options, model: Model, device: Device) -> Plan:
    """The points, and how long each may take."""
    if options.quick:
        prompts: tuple[int, ...] = (64, 512)
        decodes: tuple[tuple[int, int], ...] = ((1, 64), (4, 256))
        mixed: tuple[tuple[int, int, int, int], ...] = ((4, 64, 64, 64),)
    elif device.is_cuda:
        prompts = (512, 4096, 16_384, 32_768)
        batches, contexts = (1, 8, 32, 128, 256), (1024, 8192, 32_768)
        decodes = tuple((batch, context) for context in contexts for batch in batches)
        mixed = ((32, 1024, 512, 0), (32, 1024, 2048, 0), (32, 1024, 2048, 8192))
    else:
        prompts = (128, 512, 2048, 4096, 16_384, 32_768)
        decodes = ((1, 1024), (8, 1024), (32, 1024), (128, 1024), (256, 1024))
        decodes += ((1, 8192), (8, 8192), (32, 8192), (1, 32_768), (8, 32_768))
        mixed = ((8, 1024, 64, 0), (8, 1024, 256, 0), (8, 1024, 256, 2048))
    return Plan(
        options.prompts or prompts,
        options.decodes or decodes,
        options.step_tokens,
        budget_s=0.1 if options.quick else 2.0,
        limit_s=20.0,
        kv_bytes=_kv_bytes(model, device),
        mixed=mixed,
    )


def _kv_bytes(model: Model, device: Device) -> int:
    free = device.free_bytes() - 2 * model.cost.weight_bytes()
    if device.is_cuda:
        return max(0, free + model.cost.weight_bytes() - _WORKSPACE_BYTES)
    return max(0, min(_CPU_KV_BYTES, free // 2))


def _kernel_plan(options: Options, plan: Plan, device: Device) -> KernelPlan:
    if options.quick:
        return KernelPlan(plan.decodes, ((0, 64), (64, 64)), (1, 64), 0.02, plan.kv_bytes)
    decodes: tuple[tuple[int, int], ...] = ((1, 8192), (8, 1024), (32, 1024), (8, 8192))
    if device.is_cuda:
        decodes += ((32, 8192), (256, 1024), (1, 32_768))
    chunks = ((0, 512), (0, 2048), (6144, 2048), (14_336, 2048))
    return KernelPlan(decodes, chunks, (1, 32, 512, 2048), 0.3, plan.kv_bytes)


def _profiled(plan: Plan) -> tuple[tuple[Chunk, ...], ...]:
    """A middling decode step and a chunk of a prompt."""
    batch, context = plan.decodes[min(2, len(plan.decodes) - 1)]
    decode = (Chunk(context - 1, 1),) * batch
    return decode, (Chunk(0, min(512, plan.step_tokens)),)
