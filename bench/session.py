"""The whole measurement: for each model every system in turns, workload by workload, in rounds."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import machine
from bench.environments import CACHE
from bench.measure import RATE_SHARE, Driver, Figures, Measured
from bench.ports import free_port
from bench.process import StartError, busy_s
from bench.server import PORTS, Server, Startup
from bench.systems import SYSTEMS, Place, System, python_of
from bench.turns import Turns
from bench.workloads import WORKLOADS, Arrivals, Load, Setting, Workload

Say = Callable[[str], None]

_MOST_REPEATS = 3  # of the planned rounds, counting those with too much noise


@dataclass(frozen=True, slots=True)
class Plan:
    """`models` maps the names of shapes to the directories of their models."""

    models: dict[str, Path]
    systems: tuple[str, ...]
    workloads: tuple[str, ...]
    rounds: int
    cpus: tuple[int, ...]
    device: str = "cpu"
    restart: bool = False
    timeout_s: float = 600.0
    lock: Path | None = None
    noise_limit: float | None = None  # share of the cores that others may use in a round
    extra: dict[str, tuple[str, ...]] = field(default_factory=dict)  # system -> flags

    @property
    def reference(self) -> str:
        """What ratios are against: the first peer, or the first system when there is none."""
        peers = [name for name in self.systems if SYSTEMS[name].peer]
        return (peers or list(self.systems))[0]


@dataclass(frozen=True, slots=True)
class Run:
    model: str
    workload: str
    system: str
    round: int
    figures: Figures
    errors: tuple[tuple[str, int], ...]


@dataclass
class Result:
    """What was measured so far. `systems` is model -> system -> how it was started and its costs,
    or why it could not be."""

    runs: list[Run] = field(default_factory=list)
    systems: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def as_json(self, plan: Plan, command: str, setting: dict[str, Any]) -> dict[str, Any]:
        return {
            "benchmark": "peers",
            "format": 1,
            "command": command,
            "revision": machine.revision(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine.describe(plan.cpus),
            "reference": plan.reference,
            "rounds": plan.rounds,
            "noise_limit": plan.noise_limit,
            "setting": setting,
            "workloads": {name: WORKLOADS[name].describe for name in plan.workloads},
            "systems": self.systems,
            "runs": [asdict(run) for run in self.runs],
        }


class ModelSession:
    """Every round of one model. Servers live from `run`'s start to its end."""

    def __init__(
        self, plan: Plan, name: str, setting: Setting, pythons: dict[str, Path], say: Say
    ) -> None:
        self._plan = plan
        self._model = name
        self._setting = setting
        self._pythons = pythons
        self._say = say
        self._turns: Turns[Server] = Turns(self._make, plan.restart)
        self._rates: dict[str, float] = {}  # requests/s at saturation, by system
        self.runs: list[Run] = []
        self.systems: dict[str, dict[str, Any]] = {}

    async def run(self) -> None:
        try:
            for name in self._pythons:
                await self._start(name)
            await self._rounds()
        finally:
            for name, count in self._turns.restarts.items():
                self.systems[name]["restarts"] = count
            await self._turns.close()

    async def _rounds(self) -> None:
        """As many rounds as planned; those with too much noise are repeated, within bounds."""
        left = dict.fromkeys(self._plan.workloads, self._plan.rounds)
        for round_ in range(self._plan.rounds * _MOST_REPEATS):
            for workload in [name for name, count in left.items() if count > 0]:
                shares = await self._round(WORKLOADS[workload], round_)
                limit = self._plan.noise_limit
                if limit is None or max(shares, default=0.0) <= limit:
                    left[workload] -= 1
                else:
                    self._say(f"  too much noise in this round of {workload}: not counted")

    async def _start(self, name: str) -> None:
        self._say(f"{self._model}: starting {name}")
        entry = self.systems[name] = {"describe": SYSTEMS[name].describe}
        try:
            server = await self._first(name)
            startup = await server.idle()
        except StartError as error:
            entry["failed"] = str(error)
            self._say(f"  {error}")
            return
        finally:
            await self._turns.rest()
        entry["commands"] = [
            {"argv": list(command.argv), "env": dict(command.env)} for command in server.commands
        ]
        entry |= asdict(startup)
        self._say(f"  {name}: {_describe(startup)}")

    async def _first(self, name: str) -> Server:
        """Start a server for the first time; without the parked ones when it fails next to them
        (memory): then they do not fit together, and each turn starts anew."""
        try:
            return await self._turns.take(name)
        except StartError as error:
            if not self._turns.names():
                raise
            self._say(f"  {str(error).splitlines()[0]} Once more without the parked servers")
        await self._turns.close()
        server = await self._turns.take(name)
        self._turns.restart = True
        self._say("  servers do not fit next to each other: from now on each turn starts anew")
        return server

    async def _round(self, workload: Workload, round_: int) -> list[float]:
        """Every system once; returns what share of the cores others used meanwhile."""
        load = workload.build(self._setting, round_)
        names = [name for name in self._pythons if "failed" not in self.systems[name]]
        if isinstance(load, Arrivals):
            for name in names:
                await self._calibrate(name, load)
        first = round_ % max(1, len(names))  # no one always follows the same one
        shares: list[float] = []
        for name in names[first:] + names[:first]:
            if isinstance(load, Arrivals) and self._rate(name, load) is None:
                continue
            async with self._exclusively():
                measured = await self._measure(name, load)
            run = Run(self._model, workload.name, name, round_, measured.figures, measured.errors)
            self.runs.append(run)
            self._say(_progress(run, self._plan.rounds))
            shares.append(measured.figures.get("others_cpu_share", 0.0))
        return shares

    @asynccontextmanager
    async def _exclusively(self) -> AsyncGenerator[None, None]:
        """Hold the lock; nobody has the cores after it: some servers use them even when idle."""
        async with machine.exclusively(self._plan.lock):
            try:
                yield
            finally:
                await self._turns.rest()

    async def _measure(self, name: str, load: Load) -> Measured:
        try:
            server = await self._turns.take(name)
        except StartError as error:
            return Measured({"failed": 1.0}, ((str(error), 1),))
        rate = self._rate(name, load) if isinstance(load, Arrivals) else None
        driver = Driver(server.target, self._plan.timeout_s, rate)
        cpu_s, busy = server.processes.cpu_s(), busy_s(self._plan.cpus)
        try:
            measured = await driver.run(load)
        except TimeoutError:
            return Measured({"failed": 1.0}, ((f"no end in {self._plan.timeout_s:g} s", 1),))
        figures = dict(measured.figures)
        figures["server_cpu_s"] = server.processes.cpu_s() - cpu_s
        others = busy_s(self._plan.cpus) - busy - figures["server_cpu_s"] - figures["client_cpu_s"]
        available_s = figures["wall_s"] * len(self._plan.cpus)
        figures["others_cpu_share"] = max(0.0, others / available_s)
        return Measured(figures, measured.errors)

    async def _calibrate(self, name: str, load: Arrivals) -> None:
        """Find out once what rate the system can sustain."""
        if name in self._rates or "saturation_failed" in self.systems[name]:
            return
        try:
            async with self._exclusively():
                server = await self._turns.take(name)
                driver = Driver(server.target, self._plan.timeout_s)
                rate = await driver.saturation_rate(load.calibration)
        except (StartError, RuntimeError) as error:
            self.systems[name]["saturation_failed"] = str(error)
            self._say(f"  {name}: {error}")
            return
        self._rates[name] = self.systems[name]["saturation_requests_per_s"] = rate
        self._say(f"  {name}: {rate:.2f} requests/s of the trace at saturation")

    def _rate(self, name: str, load: Arrivals) -> float | None:
        """Requests per second to offer; the reference's share where it has one."""
        known = self._rates.get(name)
        if not load.own_rate:
            known = self._rates.get(self._plan.reference, known)
        return None if known is None else known * RATE_SHARE

    def _make(self, name: str) -> Server:
        place = Place(
            self._model,
            self._plan.models[self._model],
            self._plan.cpus,
            [free_port() for _ in range(PORTS)],
            self._plan.device,
            self._plan.extra.get(name, ()),
        )
        log = CACHE / "logs" / f"{self._model}-{name}.log"
        return Server(SYSTEMS[name], place, self._pythons[name], self._setting.vocab, log)


async def run_models(
    plan: Plan, settings: dict[str, Setting], pythons: dict[str, Path], result: Result, say: Say
) -> None:
    """Fill `result`, also when this is cancelled half-way."""
    for name in plan.models:
        session = ModelSession(plan, name, settings[name], pythons, say)
        result.systems[name] = session.systems
        try:
            await session.run()
        finally:
            result.runs += session.runs


def find_pythons(plan: Plan, say: Say) -> dict[str, Path]:
    """The interpreter of each system, in the order of the plan. Raises EnvironmentFailed."""
    found = {}
    for name in plan.systems:
        system: System = SYSTEMS[name]
        environment = system.environment
        if plan.device == "cpu" and environment is not None and not environment().made:
            say(f"making an environment for {name} (once; minutes and gigabytes)")
        found[name] = python_of(system, plan.device)
    return found


def _describe(startup: Startup) -> str:
    return (
        f"ready in {startup.ready_s:.1f} s, {startup.memory_bytes / 2**30:.2f} GiB in "
        f"{startup.processes} processes, idle {startup.idle_cpu_share:.1%} of a core"
    )


def _progress(run: Run, rounds: int) -> str:
    figures = run.figures
    parts = []
    if "output_tokens_per_s" in figures:
        parts.append(f"{figures['output_tokens_per_s']:,.0f} tokens/s")
    for key, title in (
        ("ttft_p50_s", "TTFT"),
        ("tpot_p50_s", "TPOT"),
        ("long_ttft_s", "long TTFT"),
        ("itl_before_p99_s", "ITL p99"),
        ("itl_during_p99_s", "during"),
    ):
        if key in figures:
            parts.append(f"{title} {figures[key] * 1e3:,.1f} ms")
    if (share := figures.get("others_cpu_share", 0.0)) > 0.05:
        parts.append(f"others used {share:.0%} of the cores")
    if figures.get("failed"):
        parts.append(f"{figures['failed']:.0f} FAILED: {run.errors[0][0] if run.errors else '?'}")
    at = f"{run.round + 1}/{rounds} {run.model} {run.workload}"
    return f"{at:<28} {run.system:<14} {' · '.join(parts)}"
