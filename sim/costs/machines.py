"""The machines of the simulator, from datasheets, and the fractions of these that are achieved.

Sources:
    A800    NVIDIA A800 80GB SXM datasheet: an A100 (312 TFLOP/s bf16 dense, 2,039 GB/s) whose
            NVLink is cut from 600 to 400 GB/s, both directions together
    H100    NVIDIA H100 SXM datasheet: 989 TFLOP/s bf16 dense, 3.35 TB/s, NVLink 900 GB/s
    H800    an H100 whose NVLink is cut to 400 GB/s
    H200    NVIDIA H200 SXM datasheet: as H100, 141 GB at 4.8 TB/s
    B200    NVIDIA DGX B200 datasheet, per GPU: 2.25 PFLOP/s bf16 dense, 180 GB at 8 TB/s, NVLink
            1,800 GB/s
    8xA800  Mooncake (FAST'25), Table 1 and section 5.1: host to device 128 GB/s, four NICs of 200
            Gbps
    8xH800  the same paper: eight NICs of 400 Gbps (section 5.4.1)
    DGX     NVIDIA DGX H100, H200 and B200 datasheets: eight ports of 400 Gbps, PCIe
            generation 5 (twice the host-to-device figure of the A800 node)

What is achieved: of four NICs of 200 Gbps 87 of 100 GB/s, of eight of 400 Gbps 190 of 400 GB/s
(FAST'25, section 5.4.1, Transfer Engine); of host to device 80 %: 43 GB of KV in 0.42 s (FAST'25,
figure 14, "Load Cache" of 128k tokens).
The A800's fractions and overhead are fitted to figure 14 of the same paper (see
`sim.costs.published`): the overhead is that of vLLM 0.5.1. Those of Hopper and Blackwell are
assumptions (for attention, the FlashAttention-3 paper has up to 0.75 of an H100): what was found
published to hold them against is in FP8.
NVMe is in no paper: four drives of PCIe generation 4, 6.8 GB/s reading and 4 GB/s writing each,
which is what vendors of such drives state, and twice as many in a DGX. An assumption.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.errors import ConfigError

GB, TB = 1e9, 1e12
_PCIE_EFFICIENCY = 0.8


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator. Rates per second; `nvlink_bytes_per_s` is one direction.

    Fractions of these that are achieved: `prefill_efficiency` of `flops` in products of large
    matrices, `attention_efficiency` in causal attention of prompts, `decode_efficiency` of
    `hbm_bytes_per_s` when weights are read, `kv_efficiency` when KV is, `nvlink_efficiency` of the
    links in an all-reduce (the bus bandwidth that NCCL's own tests define).
    """

    name: str
    flops: float  # dense bf16
    hbm_bytes_per_s: float
    hbm_bytes: float
    nvlink_bytes_per_s: float
    prefill_efficiency: float
    attention_efficiency: float
    decode_efficiency: float
    kv_efficiency: float
    nvlink_efficiency: float = 0.75


@dataclass(frozen=True, slots=True)
class Node:
    """A machine with GPUs. Bandwidths are of the whole node in one direction, as achieved."""

    name: str
    gpu: Gpu
    gpus: int
    nic_bytes_per_s: float
    pcie_bytes_per_s: float  # host to device
    nvme_read_bytes_per_s: float
    nvme_write_bytes_per_s: float
    step_overhead_s: float  # of the engine on it: scheduling, launches, sampling


_A800 = Gpu(
    name="A800",
    flops=312e12,
    hbm_bytes_per_s=2.039 * TB,
    hbm_bytes=80 * GB,
    nvlink_bytes_per_s=200 * GB,
    prefill_efficiency=0.685,
    attention_efficiency=0.69,
    decode_efficiency=0.80,
    kv_efficiency=0.58,
)
_H100 = Gpu(
    name="H100",
    flops=989e12,
    hbm_bytes_per_s=3.35 * TB,
    hbm_bytes=80 * GB,
    nvlink_bytes_per_s=450 * GB,
    prefill_efficiency=0.65,
    attention_efficiency=0.55,
    decode_efficiency=0.80,
    kv_efficiency=0.70,
)
_H800 = replace(_H100, name="H800", nvlink_bytes_per_s=200 * GB)
_H200 = replace(_H100, name="H200", hbm_bytes_per_s=4.8 * TB, hbm_bytes=141 * GB)
_B200 = replace(
    _H100,
    name="B200",
    flops=2250e12,
    hbm_bytes_per_s=8 * TB,
    hbm_bytes=180 * GB,
    nvlink_bytes_per_s=900 * GB,
)

_A800_NODE = Node(
    name="8xA800",
    gpu=_A800,
    gpus=8,
    nic_bytes_per_s=87 * GB,
    pcie_bytes_per_s=128 * GB * _PCIE_EFFICIENCY,
    nvme_read_bytes_per_s=4 * 6.8 * GB,
    nvme_write_bytes_per_s=4 * 4.0 * GB,
    step_overhead_s=13.2e-3,
)
_H800_NODE = replace(
    _A800_NODE, name="8xH800", gpu=_H800, nic_bytes_per_s=190 * GB, step_overhead_s=3e-3
)


def _dgx(gpu: Gpu) -> Node:
    return replace(
        _H800_NODE,
        name=f"8x{gpu.name}",
        gpu=gpu,
        pcie_bytes_per_s=256 * GB * _PCIE_EFFICIENCY,
        nvme_read_bytes_per_s=8 * 6.8 * GB,
        nvme_write_bytes_per_s=8 * 4.0 * GB,
    )


MACHINES: dict[str, Node] = {
    node.name: node for node in (_A800_NODE, _H800_NODE, _dgx(_H100), _dgx(_H200), _dgx(_B200))
}


def machine_named(name: str) -> Node:
    """Raises ConfigError that lists the names there are."""
    if name not in MACHINES:
        raise ConfigError(f"no machine {name!r} in the simulator; there are {', '.join(MACHINES)}")
    return MACHINES[name]


def machine_of(gpu: str) -> Node:
    """The node of eight of these. Raises ConfigError that lists those there are."""
    found = {node.gpu.name.lower(): node for node in MACHINES.values()}
    if gpu.lower() not in found:
        names = ", ".join(node.gpu.name for node in MACHINES.values())
        raise ConfigError(f"no node with {gpu!r} in the simulator; there are {names}")
    return found[gpu.lower()]


def with_network(node: Node, gbps: float) -> Node:
    """The same node with NICs of `gbps` in all, of which 87 % are achieved: for sweeps."""
    return replace(node, nic_bytes_per_s=gbps * 1e9 / 8 * 0.87)
