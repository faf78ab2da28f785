"""How GPUs and network adapters of a machine are connected: `nvidia-smi topo -m`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# From near to far, as its legend has them; NV# are bonded NVLinks.
_PCIE = ("PIX", "PXB", "PHB", "NODE", "SYS")
_FAR = ("NODE", "SYS")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Topology:
    """`links` has each pair in the order of the table."""

    gpus: tuple[str, ...]
    adapters: tuple[str, ...]
    links: dict[tuple[str, str], str]

    @property
    def pairs(self) -> Counter[str]:
        """How many pairs of GPUs have which link."""
        return Counter(
            self.links.get((one, other), "?")
            for index, one in enumerate(self.gpus)
            for other in self.gpus[index + 1 :]
        )

    @property
    def far_from_adapters(self) -> tuple[str, ...]:
        """GPUs whose nearest adapter is behind another host bridge or socket."""
        return tuple(gpu for gpu in self.gpus if self.adapters and self._nearest(gpu) in _FAR)

    def _nearest(self, gpu: str) -> str:
        found = {self.links.get((gpu, adapter), "SYS") for adapter in self.adapters}
        return next((link for link in _PCIE if link in found), "SYS")


def parse(text: str) -> Topology | None:
    """None when this is no such table."""
    rows = [_COLOUR.sub("", line).split() for line in text.splitlines()]
    rows = [row for row in rows if row]
    if not rows or rows[0][0] != "GPU0":
        return None
    header, *rows = rows
    devices = header[: header.index("CPU")] if "CPU" in header else header  # "CPU Affinity", ...
    links = {
        (name, other): link
        for name, *cells in rows
        if name in devices
        for other, link in zip(devices, cells, strict=False)
    }
    gpus = tuple(name for name in devices if name.startswith("GPU"))
    return Topology(gpus, tuple(name for name in devices if name not in gpus), links)
