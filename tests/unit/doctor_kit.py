"""A machine for `baton doctor` that a test makes up."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.cli.doctor.machine import Found

GIB = 1 << 30


@dataclass
class FakeMachine:
    """Implements Machine."""

    probes: dict[tuple[str, ...], Found] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    topo: str | None = None
    limits: dict[int, int] = field(default_factory=dict)
    disks: dict[str, int] = field(default_factory=lambda: {"/dev/shm": GIB})
    taken: tuple[int, ...] = ()
    memory: int = 16 * GIB

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def names(self, path: str) -> list[str]:
        below = [
            name.removeprefix(f"{path}/") for name in self.files if name.startswith(f"{path}/")
        ]
        return sorted({name.split("/")[0] for name in below})

    def run(self, *command: str) -> str | None:
        return self.topo

    def probe(self, *what: str) -> Found:
        return self.probes[what]

    def available_memory(self) -> int:
        return self.memory

    def limit(self, resource: int) -> int | None:
        return self.limits.get(resource)

    def free(self, path: str) -> int | None:
        return self.disks.get(path)

    def port_is_free(self, port: int) -> bool:
        return port not in self.taken
