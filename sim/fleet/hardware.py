"""What the modelled machines cost: steps, room for KV, and the links between and inside of them.

A read crosses the NICs of both nodes when these are different, and the host's link to its GPUs
where one end is in CPU memory and the other is not. Between the CPU tier of a node and its NVMe
there are drives, which have a rate for reads and one for writes.
"""

from __future__ import annotations

from baton.errors import ConfigError
from baton.types.fleet import KvLayout
from sim.costs.calibrate import PREFIX, calibrated
from sim.costs.capacity import kv_capacity_blocks
from sim.costs.compute import Roofline, StepCost, attention_flops, product_flops
from sim.costs.links import SharedLinks
from sim.costs.machines import machine_named, with_network
from sim.costs.models import model_named
from sim.costs.overheads import OVERHEADS, WithOverhead
from sim.costs.serving import ServedCost
from sim.fleet.one_machine import OneMachine
from sim.fleet.prompts import BLOCK_TOKENS
from sim.fleet.spec import FleetSpec
from sim.fleet.transport import Place

_DTYPES = {2: "bfloat16", 4: "float32"}


_GBPS = 1e9 / 8


class Hardware:
    """Nodes that are all alike. Implements `sim.fleet.transport.Carrier`.

    Of a preset, everything is known. Of a calibrated machine, only what steps take: the spec says
    how many blocks a worker has and how fast its links are. Without links, all workers are on one
    machine, when the file says what a cluster takes there. Raises ConfigError.
    """

    def __init__(self, spec: FleetSpec) -> None:
        self._model = model_named(spec.model)
        self._grain = spec.grain
        self._nvme_bytes_per_s: dict[str, float] = {}
        self.cost: StepCost
        self.machine: OneMachine | None = None  # that all nodes are on, if they are on one
        if spec.node.startswith(PREFIX):
            found = calibrated(spec.node)
            if not (spec.kv_blocks and (spec.network_gbps or found.serving)):
                raise ConfigError(f"{spec.node} needs --kv-blocks and --network-gbps")
            if found.kv_bytes_per_token != self._model.kv_bytes_per_token:
                raise ConfigError(f"{spec.node} is of {found.model}, not of {spec.model}")
            self.cost = found.cost
            self.kv_blocks = spec.kv_blocks  # of a worker's pool
            self._nic_bytes_per_s = self._host_bytes_per_s = spec.network_gbps * _GBPS
            if found.serving is not None and not spec.network_gbps:
                self.cost = ServedCost(found.runner, found.serving.overheads)
                self.machine = OneMachine(found.serving, spec.prefill, spec.decode)
            if spec.nvme_blocks:
                raise ConfigError(f"{spec.node} says nothing of NVMe: leave out --nvme-blocks")
        else:
            node = machine_named(spec.node)
            if spec.network_gbps:
                node = with_network(node, spec.network_gbps)
            gpus = spec.tensor_parallel or node.gpus
            self.cost = Roofline(self._model, node, gpus)
            room = kv_capacity_blocks(self._model, node, gpus, BLOCK_TOKENS)
            self.kv_blocks = spec.kv_blocks or room
            self._nic_bytes_per_s = node.nic_bytes_per_s
            self._host_bytes_per_s = node.pcie_bytes_per_s
            if spec.nvme_blocks:
                self._nvme_bytes_per_s = {
                    "read": node.nvme_read_bytes_per_s,
                    "write": node.nvme_write_bytes_per_s,
                }
        overhead = OVERHEADS[spec.overheads]
        if overhead is not None:
            self.cost = WithOverhead(self.cost, overhead)
        self._links = SharedLinks()
        self._names: list[str] = []  # of the links

    def add_node(self, node: str) -> None:
        if self.machine is not None:
            return
        for direction in ("out", "in"):
            self._add(_nic(node, direction), self._nic_bytes_per_s)
            self._add(_host(node, direction), self._host_bytes_per_s)
        for operation, rate in self._nvme_bytes_per_s.items():
            self._add(_nvme(node, operation), rate)

    def _add(self, link: str, bytes_per_s: float) -> None:
        self._links.add(link, bytes_per_s)
        self._names.append(link)

    @property
    def layout(self) -> KvLayout:
        """Of blocks that are counted in units, and have the bytes of all their tokens."""
        model = self._model
        return KvLayout(
            model.name,
            _DTYPES[model.kv_width],
            model.num_layers,
            model.kv_heads,
            model.head_dim * self._grain,
            BLOCK_TOKENS // self._grain,
        )

    @property
    def pair_to_token(self) -> float:
        """Of units."""
        model = self._model
        pair = attention_flops(model, 1)  # of the token with itself
        return self._grain * pair / product_flops(model, 1, 0)

    async def carry(self, source: Place, reader: Place, nbytes: int) -> None:
        if self.machine is not None:
            tokens = nbytes / self._model.kv_bytes_per_token
            await self.machine.hand_over(source.node, reader.node, tokens)
            return
        path = []
        if source.host != reader.host:
            host, direction = (source, "in") if source.host else (reader, "out")
            path.append(_host(host.node, direction))
        if source.node != reader.node:
            path += [_nic(source.node, "out"), _nic(reader.node, "in")]
        await self._links.transfer(path, nbytes)

    async def carry_nvme(self, node: str, read: int, written: int) -> None:
        """So many blocks, read from the node's drives and written to them."""
        for operation, blocks in (("read", read), ("write", written)):
            if blocks:
                nbytes = blocks * self.layout.block_bytes
                await self._links.transfer([_nvme(node, operation)], nbytes)

    def moved(self) -> dict[str, float]:
        """Bytes over each link so far."""
        return {name: self._links.moved(name) for name in self._names}


def _nic(node: str, direction: str) -> str:
    return f"{node} NIC {direction}"


def _host(node: str, direction: str) -> str:
    """`in`: into the GPUs."""
    return f"{node} host {direction}"


def _nvme(node: str, operation: str) -> str:
    """`read`: from the drives."""
    return f"{node} NVMe {operation}"
