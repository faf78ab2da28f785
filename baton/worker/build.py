"""Assemble a worker from its configuration: model, layout, pool memory, runner."""

from __future__ import annotations

import asyncio
import logging
import os
import socket

import torch

from baton.cpus import Placement, choose_placement
from baton.engine.config import EngineConfig
from baton.engine.make_runner import make_runner
from baton.errors import ConfigError
from baton.free_memory import available_bytes
from baton.kv.digest import Verify
from baton.kv.handoff.options import HandoffOptions
from baton.kv.identity import Identity, life, new_incarnation
from baton.kv.transport.registry import make_transport
from baton.kv.transport.shared import SharedTransport
from baton.model.hub import resolve_model
from baton.model.spec import ModelSpec, choose_dtype, kv_layout, load_spec, pair_to_token
from baton.types.fleet import KvLayout, Role
from baton.worker.address import reachable_address
from baton.worker.config import WorkerConfig
from baton.worker.memory import (
    GPU_WORKSPACE_BYTES,
    Room,
    choose_num_blocks,
    cpu_workspace_bytes,
    weight_bytes,
)
from baton.worker.parts import WorkerParts

log = logging.getLogger(__name__)


async def build(config: WorkerConfig, role: Role) -> WorkerParts:
    """Load the model and get the memory. Takes as long as the weights take to read.

    Raises ConfigError, ModelLoadError and TransportError.
    """
    model_dir = await asyncio.to_thread(resolve_model, config.model or None)
    spec = await asyncio.to_thread(load_spec, model_dir)
    device = choose_device(config.device)
    placement = choose_placement(config.cpus, config.threads)
    layout = kv_layout(spec, choose_dtype(config.dtype, spec, device), config.block_size)
    weights = weight_bytes(model_dir, spec.dtype, layout.dtype)
    max_model_len = _max_model_len(config, spec)
    room = _room(config, spec, weights, device)
    num_blocks = choose_num_blocks(config, layout, room, max_model_len)
    identity = Identity(worker_name(config, role), new_incarnation(), layout)
    host = reachable_address(config.advertise, config.listen).rpartition(":")[0]
    transport = await asyncio.to_thread(
        make_transport, config.transport, life(identity.name, identity.incarnation), host=host
    )
    await transport.start()
    try:
        memory = await asyncio.to_thread(
            transport.allocate, num_blocks * layout.block_bytes, device
        )
        runner = await asyncio.to_thread(
            make_runner,
            spec,
            model_dir,
            layout,
            memory,
            num_blocks,
            device,
            config.layer_groups,
            placement,
            config.kernels,
        )
        await asyncio.to_thread(runner.warm_up)
    except BaseException:
        await transport.close()
        raise
    return WorkerParts(
        identity=identity,
        model_name=config.model_name or model_dir.resolve().name,
        device=device,
        placement=placement,
        transport=transport,
        memory=memory,
        runner=runner,
        engine=_engine_config(config, spec, layout, num_blocks, max_model_len),
        handoff=HandoffOptions(lease_ttl_s=config.lease_ttl, verify=Verify(config.verify)),
        node=config.node or socket.gethostname(),
        shared=SharedTransport(transport),
        store=config.store,
        pair_to_token=pair_to_token(spec),
        early_prefill=_early_prefill(config.early_prefill, device, placement),
        # Without Redis no conductor can know of another one's attempts.
        orphan_timeout_s=config.orphan_timeout if config.redis else 0.0,
    )


def worker_name(config: WorkerConfig, role: Role) -> str:
    return config.name or f"{role}-{socket.gethostname()}-{os.getpid()}"


def choose_device(name: str) -> str:
    """`cpu` or `cuda:N`. Raises ConfigError when the device is not there."""
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if int(number or "0") >= torch.cuda.device_count():
        raise ConfigError(f"there is no {name} here: torch sees {torch.cuda.device_count()} GPUs")
    return f"cuda:{number or '0'}"


def _early_prefill(wanted: str, device: str, placement: Placement) -> bool:
    """What copies KV would take turns with a CPU's threads, which wait for one another."""
    if wanted != "auto":
        return wanted == "on"
    return device != "cpu" or placement.threads < len(placement.cpus)


def _room(config: WorkerConfig, spec: ModelSpec, weights: int, device: str) -> Room:
    if device == "cpu":
        workspace = cpu_workspace_bytes(spec, config.max_batch_tokens, config.max_num_seqs)
        return Room(available_bytes(), weights, workspace)
    free, _ = torch.cuda.mem_get_info(device)
    return Room(free, weights, GPU_WORKSPACE_BYTES, gpu=True)


def _max_model_len(config: WorkerConfig, spec: ModelSpec) -> int:
    if config.max_model_len > spec.max_model_len:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the model's "
            f"{spec.max_model_len} tokens"
        )
    return config.max_model_len or spec.max_model_len


def _engine_config(
    config: WorkerConfig, spec: ModelSpec, layout: KvLayout, num_blocks: int, max_model_len: int
) -> EngineConfig:
    return EngineConfig(
        layout=layout,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        eos_token_ids=spec.eos_token_ids,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_prefill_tokens=config.max_prefill_tokens or None,
        prompts_first=config.prompts_first,
        max_waiting=config.max_waiting,
        prefix_caching=config.prefix_caching,
        layer_groups=config.layer_groups,
        by_layers_bytes=config.by_layers_kib << 10,
        vocab_size=spec.vocab_size,
    )
