"""Which runner serves a model: on a CPU the native one where it fits, on a GPU the one that queues
and records steps, else torch's."""

from __future__ import annotations

import logging
from pathlib import Path

from baton.cpus import Placement
from baton.engine.cuda_runner import CudaRunner
from baton.engine.graph_backend import CudaBackend
from baton.engine.native_runner import NativeRunner
from baton.engine.runner import TorchRunner
from baton.errors import ConfigError
from baton.kernels.dispatch import kernels_for
from baton.kv.transport.base import PoolMemory
from baton.model.native_decoder import why_not_native
from baton.model.spec import ModelSpec
from baton.types.fleet import KvLayout

log = logging.getLogger(__name__)


def make_runner(
    spec: ModelSpec,
    model_dir: Path,
    layout: KvLayout,
    memory: PoolMemory,
    num_blocks: int,
    device: str,
    layer_groups: int,
    placement: Placement,
    kernels: str = "auto",
) -> NativeRunner | CudaRunner | TorchRunner:
    """A loaded runner; see `TorchRunner` for the arguments. `kernels` is "native" (C++ for CPUs
    with AMX or AVX-512 BF16), a name for `kernels_for`, or "auto": the fastest that can run the
    model on the device.

    Raises ModelLoadError, and ConfigError for kernels that cannot run it.
    """
    reason = why_not_native(spec, device, layout.dtype) if kernels in ("auto", "native") else None
    if kernels == "native" and reason is not None:
        raise ConfigError(f"--kernels native cannot be used: {reason}")
    if kernels == "native" or (kernels == "auto" and reason is None):
        return NativeRunner(
            spec,
            model_dir,
            layout,
            memory,
            num_blocks,
            layer_groups,
            placement.threads,
            placement.cpus,
        )
    named = None if kernels == "auto" else kernels
    if device.startswith("cuda") and kernels != "reference":
        return CudaRunner(
            spec,
            model_dir,
            layout,
            memory,
            num_blocks,
            layer_groups,
            kernels_for(device, named),
            CudaBackend(device),
        )
    if device == "cpu" and reason is not None:
        log.info("Computing through torch: %s.", reason)
    return TorchRunner(
        spec,
        model_dir,
        layout,
        memory,
        num_blocks,
        device,
        layer_groups,
        placement.threads,
        named,
    )
