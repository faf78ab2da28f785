"""How busy workers and links are, as time goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from baton.types.fleet import BlockState
from sim.fleet.datacentre import Datacentre
from sim.fleet.device import ModelledDevice
from sim.fleet.host import Host
from sim.fleet.records import LinkSample, Table, WorkerSample

_IN_USE = (BlockState.ACTIVE, BlockState.LEASED, BlockState.QUARANTINED)


class Sampler:
    """Looks at a datacentre now and then. Times count from `began`."""

    def __init__(self, datacentre: Datacentre, began: float) -> None:
        self.workers = Table(WorkerSample)
        self.links = Table(LinkSample)
        self._datacentre = datacentre
        self._began = began
        self._busy: dict[str, tuple[float, float]] = {}  # at the sample before
        self._moved: Mapping[str, float] = {}

    async def run(self, every_s: float) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            self.sample()

    def sample(self) -> None:
        now = asyncio.get_running_loop().time() - self._began
        for host in self._datacentre.hosts:
            if host.device is not None:
                self.workers.append(self._look_at(host, host.device, now))
        moved = self._datacentre.hardware.moved()
        for link, total in moved.items():
            if nbytes := round(total) - round(self._moved.get(link, 0.0)):
                self.links.append(LinkSample(now, link, nbytes))
        self._moved = moved

    def _look_at(self, host: Host, device: ModelledDevice, now: float) -> WorkerSample:
        load = host.service.load()
        prefill_s, decode_s = self._busy.get(host.name, (0.0, 0.0))
        self._busy[host.name] = (device.prefill_s, device.decode_s)
        return WorkerSample(
            at_s=now,
            worker=host.name,
            role=host.role.value,
            queue=load.waiting,
            running=load.running,
            kv_share=load.blocks_in(*_IN_USE) / sum(count for _, count in load.blocks),
            prefill_s=device.prefill_s - prefill_s,
            decode_s=device.decode_s - decode_s,
        )
