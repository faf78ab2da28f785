"""`python -m sim.overload [NAME...]`: many times what a modelled cluster can do, in virtual time.

The production conductor, workers and handoff; a step takes modelled seconds, so that the figures
are the same on every machine, however busy it is. Capacity is what a closed loop gets answered.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.bench.load import poisson_arrivals
from baton.bench.stats import percentile
from baton.errors import BatonError, Overloaded
from conductor.admission import Slos
from conductor.dispatch import Usage
from conductor.request import Ask, Options
from conductor.service import Conductor
from sim.cluster import MODEL, Cluster, HostedConductor
from sim.log import EventLog
from sim.loop import SimLoop
from sim.network import Network
from sim.overload_shapes import WORKLOADS, Workload
from sim.plan import Weather

CLOSED_S = 10.0
REFUSED_S = 0.1  # until a client of the closed loop asks again
SETTLE_S = 3.0
RETURN_S = 5.0  # after the load has gone


@dataclass(frozen=True, slots=True)
class Seen:
    """By a client. Seconds; `first_s` None: there was no token."""

    at: float
    code: str
    first_s: float | None
    end_s: float
    tokens: int
    placed: bool  # a worker was asked to work on it

    def keeps(self, slos: Slos) -> bool:
        if self.code != "ok" or self.first_s is None:
            return False
        tpot_s = (self.end_s - self.first_s) / max(self.tokens - 1, 1)
        return self.first_s <= (slos.ttft_s or 1e9) and tpot_s <= (slos.tpot_s or 1e9)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a phase. Rates per second; `running`: most requests that the conductor held;
    `refused_late`: those that a worker had been given before they were refused."""

    name: str
    offered_per_s: float
    answered_per_s: float
    goodput_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    reject_p99_s: float
    running: int
    refused_late: int
    codes: dict[str, int]


@dataclass(slots=True)
class _Phase:
    name: str
    began: float
    seconds: float
    seen: list[Seen] = field(default_factory=list)
    running: int = 0

    def figures(self, slos: Slos, name: str = "", first_s: float = math.inf) -> Figures:
        """Of what was sent in the first `first_s` of it."""
        seen = [each for each in self.seen if each.at < self.began + first_s]
        seconds = min(self.seconds, first_s)
        ok = [each for each in seen if each.code == "ok"]
        ttft = sorted(each.first_s for each in ok if each.first_s is not None)
        refused = [each for each in seen if each.code == Overloaded.code]
        refused_s = sorted(each.end_s for each in refused)
        return Figures(
            name=name or self.name,
            offered_per_s=len(seen) / seconds,
            answered_per_s=len(ok) / seconds,
            goodput_per_s=sum(each.keeps(slos) for each in seen) / seconds,
            ttft_p50_s=percentile(ttft, 50) if ttft else math.nan,
            ttft_p99_s=percentile(ttft, 99) if ttft else math.nan,
            reject_p99_s=percentile(refused_s, 99) if refused_s else math.nan,
            running=self.running,
            refused_late=sum(each.placed for each in refused),
            codes=dict(Counter(each.code for each in seen)),
        )


class Overload:
    """One cluster, asked for more and more. Protected: its conductor is told the SLOs."""

    def __init__(self, workload: Workload, seed: int, protected: bool = True) -> None:
        self._loop = SimLoop()
        self._workload = workload
        self._asks = workload.asks(seed)
        self._seed = seed
        log = EventLog(lambda: self._loop.now)
        network = Network(Weather(0.0005, 0.0003), seed, self._loop, log)
        slos = workload.slos if protected else Slos()
        self._cluster = Cluster(workload.cluster(), seed, network, log, slos)
        self._violations = log.violations

    def measure(self, times: float, seconds: float) -> list[Figures]:
        """Half of the capacity, all of it, `times` as much, and half again, each for `seconds`; and
        the first seconds of the last phase by themselves."""
        try:
            phases = self._loop.run_until_complete(self._run(times, seconds))
        finally:
            self._loop.close()
        assert not self._violations, self._violations
        slos = self._workload.slos
        made = [phase.figures(slos) for phase in phases]
        return [*made, phases[-1].figures(slos, f"first {RETURN_S:g} s", RETURN_S)]

    async def _run(self, times: float, seconds: float) -> list[_Phase]:
        cluster = self._cluster
        await cluster.start_all()
        await asyncio.sleep(SETTLE_S)
        conductor = cluster.conductor
        assert conductor is not None
        capacity = await self._capacity(conductor)
        await asyncio.sleep(SETTLE_S)
        shares = {"half": 0.5, "all": 1.0, f"{times:g} ×": times, "half, after": 0.5}
        phases = []
        async with asyncio.TaskGroup() as group:
            for name, share in shares.items():
                phase = _Phase(name, self._loop.now, seconds)
                phases.append(phase)
                await self._send(group, conductor, phase, capacity * share)
        for hosted in cluster.workers.values():
            hosted.check_integrity()
        for process in cluster.processes():
            await process.bury()
        return phases

    async def _capacity(self, conductor: HostedConductor) -> float:
        """Answers per second of a closed loop."""
        phase = _Phase("closed", self._loop.now, CLOSED_S)

        async def user() -> None:
            while self._loop.now < phase.began + CLOSED_S:
                await self._ask(conductor, phase)
                if phase.seen[-1].code != "ok":
                    await asyncio.sleep(REFUSED_S)  # refusals take no time

        async with asyncio.TaskGroup() as group:
            for _ in range(self._workload.at_once):
                group.create_task(user())
        answered = sum(each.code == "ok" for each in phase.seen)
        assert answered, Counter(each.code for each in phase.seen)
        return answered / (self._loop.now - phase.began)

    async def _send(
        self, group: asyncio.TaskGroup, conductor: HostedConductor, phase: _Phase, rate: float
    ) -> None:
        """Open loop. What is still running when the phase ends runs on in the next one."""
        burst = self._workload.burst
        for at in poisson_arrivals(rate / burst, self._seed):
            if at > phase.seconds:
                break
            await asyncio.sleep(max(0.0, phase.began + at - self._loop.now))
            for _ in range(burst):
                group.create_task(self._ask(conductor, phase))
            phase.running = max(phase.running, conductor.service.running)

    async def _ask(self, conductor: HostedConductor, phase: _Phase) -> None:
        asking = conductor.process.spawn(self._client(conductor.service), "client")
        phase.seen.append(await asking)

    async def _client(self, service: Conductor) -> Seen:
        """Runs as the conductor's process, like the handler of an HTTP request."""
        began, first, tokens, code = self._loop.now, None, 0, "ok"
        request = None
        prompt, answer_tokens = next(self._asks)
        options = Options(temperature=0.0, max_tokens=answer_tokens, ignore_eos=True)
        try:
            request = await service.prepare(Ask(MODEL, (prompt,), options), "sim")
            async with aclosing(service.generate(request)) as answer:
                async for part in answer:
                    if isinstance(part, Usage):
                        continue
                    tokens += sum(len(delta.tokens) for delta in part)
                    if tokens and first is None:
                        first = self._loop.now - began
        except BatonError as error:
            code = error.code
        timeline = service.traces.get(request.id) if request is not None else None
        placed = timeline is not None and bool(timeline.attempts)
        return Seen(began, code, first, self._loop.now - began, tokens, placed)


def table(made: Sequence[Figures]) -> str:
    """As Markdown."""
    lines = [
        "| load | offered/s | answered/s | goodput/s | TTFT p50, p99, ms | 429 p99, ms | running |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in made:
        cells = (
            each.name, f"{each.offered_per_s:.1f}", f"{each.answered_per_s:.1f}",
            f"{each.goodput_per_s:.1f}",
            f"{each.ttft_p50_s * 1e3:.0f}, {each.ttft_p99_s * 1e3:.0f}",
            "-" if math.isnan(each.reject_p99_s) else f"{each.reject_p99_s * 1e3:.1f}",
            each.running,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def summary(made: Mapping[str, Sequence[Figures]]) -> str:
    """Of several workloads, as Markdown."""
    lines = [
        "| workload | goodput/s at half, all, 10 × | 10 × / peak | late of answered | running "
        "| TTFT p50 at half, first 5 s after, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (half, full, over, _, after) in made.items():
        rates = (each.goodput_per_s for each in (half, full, over))
        cells = (
            name, ", ".join(f"{rate:.1f}" for rate in rates), f"{to_peak(made[name]):.0%}",
            f"{1 - over.goodput_per_s / over.answered_per_s:.0%}", over.running,
            f"{half.ttft_p50_s * 1e3:.0f}, {after.ttft_p50_s * 1e3:.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def to_peak(made: Sequence[Figures]) -> float:
    """Goodput of the overload, as a share of the most at no more than the capacity."""
    half, full, over = (each.goodput_per_s for each in made[:3])
    return over / max(half, full)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m sim.overload", description=__doc__)
    known = {workload.name: workload for workload in WORKLOADS}
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known) + "; all of them")
    parser.add_argument("--times", type=float, default=10.0, help="of the capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unprotected", action="store_true", help="the cluster knows no SLOs")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(known):
        parser.error(f"no such workload: {', '.join(sorted(unknown))}")
    made = {}
    for name in options.names or known:
        overload = Overload(known[name], options.seed, not options.unprotected)
        made[name] = overload.measure(options.times, options.seconds)
        if options.names:
            sys.stdout.write(f"{name}\n\n{table(made[name])}\n\n")
    sys.stdout.write(summary(made) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
