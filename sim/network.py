"""The weather between the processes: what becomes of every message, call and read.

Implements the fault plans of the in-memory services (`baton.rpc.memory`) and of the loopback
transport. Streams break or are late, as TCP's are; they never lose, repeat or reorder single
messages. Reordering happens between streams, repetition where a call's answer is lost.
"""

from __future__ import annotations

from contextvars import Context
from dataclasses import dataclass
from random import Random

from baton.kv.transport.loopback import Fault as ReadFault
from baton.kv.transport.loopback import LoopbackFabric
from baton.rpc.memory import Fault, MemoryNetwork
from baton.rpc.registry_memory import RegistryServer
from baton.types.handoff import Ranges, Renew
from baton.types.kv_events import KvEvents, KvSnapshot
from baton.types.request import AttemptId
from sim.log import EventLog
from sim.loop import SimLoop
from sim.plan import FaultKind, Weather

KEEPALIVE_S = 3.0
"""A connection over which nothing has come for so long is broken by both ends, as gRPC's is."""


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that may have cost a request an attempt, and until when it may."""

    at: float
    until: float
    kind: FaultKind
    who: str  # or between whom, as "a - b"


class Network:
    """Names are addresses: those of processes."""

    def __init__(self, weather: Weather, seed: int, loop: SimLoop, log: EventLog) -> None:
        self.services = MemoryNetwork(self, lambda: loop.now)
        self.fabric = LoopbackFabric(self)
        self.incidents: list[Incident] = []
        self.calm = False  # from some time on, nothing goes wrong by chance any more
        self._weather = weather
        self._rng = Random(seed ^ 0x5EED)
        self._loop = loop
        self._log = log
        self._blocked: dict[tuple[str, str], float] = {}  # (from, to) -> until
        self._slow: dict[str, float] = {}
        self._stopped: dict[str, float] = {}
        self._untold: set[tuple[str, str]] = set()
        self._renewed: dict[tuple[str, AttemptId], float] = {}  # (publisher, attempt) -> when

    def now(self) -> float:
        return self._loop.now

    def knows_of_loss(self, sender: str, receiver: str) -> bool:
        """Whether `receiver` can have noticed that news from `sender` was lost: the next news
        show it."""
        return (sender, receiver) not in self._untold

    def renewed_at(self, publisher: str, attempt: AttemptId) -> float | None:
        """When somebody last did what keeps the lease of published KV alive; None: never."""
        return self._renewed.get((publisher, attempt))

    def kill(self, name: str) -> None:
        """The process is gone, and its leases with it: another life may get the same attempt."""
        self.services.kill(name)
        for key in [key for key in self._renewed if key[0] == name]:
            del self._renewed[key]

    def open_registry(self) -> RegistryServer:
        """Empty, with a clock of its own. Its address is `baton.rpc.registry_memory.ADDRESS`."""
        return RegistryServer(lambda: self._loop.now)

    # -- what faults do ------------------------------------------------------------------------

    def block(self, sender: str, receiver: str, until: float) -> None:
        """Nothing passes in this direction, and the connections break if it lasts."""
        now = self._loop.now
        self._blocked[sender, receiver] = max(until, self._blocked.get((sender, receiver), 0.0))
        if until - now > KEEPALIVE_S:
            self._loop.call_at(now + KEEPALIVE_S, self.services.cut, sender, receiver)

    def slow(self, name: str, until: float) -> None:
        self._slow[name] = until

    def slowness(self, name: str) -> float:
        """What everything of this process takes longer by: a factor."""
        slow = self._slow.get(name, 0.0) > self._loop.now
        return self._weather.slow_factor if slow else 1.0

    def stopped(self, name: str, until: float) -> None:
        """The process is there, and says nothing."""
        self._stopped[name] = until

    def note(self, kind: FaultKind, who: str, lasts_s: float = 0.0) -> None:
        now = self._loop.now
        self.incidents.append(Incident(now, now + lasts_s, kind, who))

    # -- baton.rpc.memory.FaultPlan ------------------------------------------------------------

    def on_message(self, sender: str, receiver: str, message: object) -> Fault:
        self._log.note(sender, f"-> {receiver}", message)
        if self._chance(self._weather.break_rate):
            self._hit(FaultKind.BREAK, f"{sender} - {receiver}")
            return Fault(lose=True)
        if isinstance(message, (KvEvents, KvSnapshot)):
            self._untold.discard((sender, receiver))
        if isinstance(message, KvEvents) and self._chance(self._weather.lost_news_rate):
            self._hit(FaultKind.LOST_NEWS, f"{sender} - {receiver}")
            self._untold.add((sender, receiver))
            return Fault(skip=True)
        delay_s = self._latency_s(sender, receiver) + self._blocked_s(sender, receiver)
        self._note_renewal(sender, receiver, message, self._loop.now + delay_s)
        return Fault(delay_s=delay_s)

    def on_call(self, caller: str, callee: str, method: str) -> Fault:
        self._log.note(caller, f"=> {callee}", method)
        # Nobody shakes hands before both directions are open and the other one runs.
        delay_s = max(
            self._stopped_s(callee),
            self._blocked_s(caller, callee),
            self._blocked_s(callee, caller),
        )
        if self._chance(self._weather.lost_call_rate):
            self._hit(FaultKind.LOST_CALL, f"{caller} - {callee}")
            return Fault(lose=True)
        delay_s += self._latency_s(caller, callee)
        if self._chance(self._weather.lost_answer_rate):
            self._hit(FaultKind.LOST_ANSWER, f"{callee} - {caller}")
            return Fault(delay_s, lose_answer=True)
        return Fault(delay_s)

    # -- baton.kv.transport.loopback.FaultPlan -------------------------------------------------

    def on_read(self, reader: str, source: str, nbytes: int) -> ReadFault:
        here, there = _name(reader), _name(source)
        self._log.note(here, f"<< {there}", f"{nbytes} bytes")
        weather = self._weather
        if self._chance(weather.read_hang_rate):
            self._hit(FaultKind.READ_HANGS, f"{here} - {there}", KEEPALIVE_S)
            self._loop.call_later(KEEPALIVE_S, self.services.cut, here, there, context=Context())
            return ReadFault(hang=True)
        blocked_s = max(self._blocked_s(here, there), self._blocked_s(there, here))
        delay_s = max(self._stopped_s(there), blocked_s) + weather.read_delay_s * self._rng.random()
        if self._chance(weather.read_error_rate):
            self._hit(FaultKind.READ_FAILS, f"{here} - {there}")
            return ReadFault(delay_s, error="injected")
        if self._chance(weather.read_corrupt_rate):
            self._hit(FaultKind.READ_IS_WRONG, f"{here} - {there}")
            return ReadFault(delay_s, corrupt=True)
        return ReadFault(delay_s)

    # ------------------------------------------------------------------------------------------

    def _chance(self, rate: float) -> bool:
        return rate > 0 and not self.calm and self._rng.random() < rate

    def _hit(self, kind: FaultKind, who: str, lasts_s: float = 0.0) -> None:
        self._log.note("network", kind, who)
        self.note(kind, who, lasts_s)

    def _note_renewal(self, sender: str, receiver: str, message: object, arrives_at: float) -> None:
        match message:
            case Ranges():  # the lease runs at the latest from now on
                self._renewed.setdefault((sender, message.attempt), self._loop.now)
            case Renew(attempts):
                for attempt in attempts:
                    if (receiver, attempt) in self._renewed:
                        self._renewed[receiver, attempt] = arrives_at

    def _blocked_s(self, sender: str, receiver: str) -> float:
        return max(0.0, self._blocked.get((sender, receiver), 0.0) - self._loop.now)

    def _stopped_s(self, name: str) -> float:
        return max(0.0, self._stopped.get(name, 0.0) - self._loop.now)

    def _latency_s(self, sender: str, receiver: str) -> float:
        weather = self._weather
        latency_s = weather.latency_s + weather.jitter_s * self._rng.random()
        return latency_s * max(self.slowness(sender), self.slowness(receiver))


def _name(life: str) -> str:
    return life.partition("/")[0]
