"""What the modelled machines cost: steps, room for KV, and the links between and inside of them.

A read crosses the NICs of both nodes when these are different, and the host's link to its GPUs
where one end is in CPU memory and the other is not.
"""

from __future__ import annotations

from baton.types.fleet import KvLayout
from sim.costs.capacity import kv_capacity_blocks
from sim.costs.compute import Roofline, StepCost
from sim.costs.links import SharedLinks
from sim.costs.machines import machine_named
from sim.costs.models import model_named
from sim.fleet.prompts import BLOCK_TOKENS
from sim.fleet.spec import FleetSpec
from sim.fleet.transport import Place

_DTYPES = {2: "bfloat16", 4: "float32"}


class Hardware:
    """Nodes that are all alike. Implements `sim.fleet.transport.Carrier`."""

    def __init__(self, spec: FleetSpec) -> None:
        self._model, self._node = model_named(spec.model), machine_named(spec.node)
        self._grain = spec.grain
        self.gpus = spec.tensor_parallel or self._node.gpus
        self.cost: StepCost = Roofline(self._model, self._node, self.gpus)
        self._links = SharedLinks()
        self._names: list[str] = []  # of the links

    def add_node(self, node: str) -> None:
        for direction in ("out", "in"):
            self._add(_nic(node, direction), self._node.nic_bytes_per_s)
            self._add(_host(node, direction), self._node.pcie_bytes_per_s)

    def _add(self, link: str, bytes_per_s: float) -> None:
        self._links.add(link, bytes_per_s)
        self._names.append(link)

    @property
    def kv_blocks(self) -> int:
        """Of a worker's pool."""
        return kv_capacity_blocks(self._model, self._node, self.gpus, BLOCK_TOKENS)

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

    async def carry(self, source: Place, reader: Place, nbytes: int) -> None:
        path = []
        if source.host != reader.host:
            host, direction = (source, "in") if source.host else (reader, "out")
            path.append(_host(host.node, direction))
        if source.node != reader.node:
            path += [_nic(source.node, "out"), _nic(reader.node, "in")]
        await self._links.transfer(path, nbytes)

    def moved(self) -> dict[str, float]:
        """Bytes over each link so far."""
        return {name: self._links.moved(name) for name in self._names}


def _nic(node: str, direction: str) -> str:
    return f"{node} NIC {direction}"


def _host(node: str, direction: str) -> str:
    """`in`: into the GPUs."""
    return f"{node} host {direction}"
