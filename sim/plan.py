"""From a seed to all that will happen: the cluster, its requests, the weather and the faults.

A plan is a frozen value. Nothing else of a run is drawn by chance, except the fate of single
messages, which comes from a generator of the same seed (`network.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from random import Random

from baton.kv.digest import Verify
from baton.types.request import SamplingParams
from sim.disk import DiskPlan, draw_disk
from sim.runner import VOCAB, expected_answer
from sim.steps import Pace

BLOCK_SIZE = 4
DEADLINE_S = 40.0
ARRIVALS_S = 4.0  # within which all requests come
TROUBLE_S = 6.0  # within which all faults begin
CONDUCTOR = "c0"


class FaultKind(StrEnum):
    KILL = "kill"  # and a new life at `until`
    STOP = "stop"  # SIGSTOP, and SIGCONT at `until`
    PARTITION = "partition"
    ONE_WAY = "one-way partition"  # what `a` says does not reach `b`
    BREAK = "break"  # the streams between `a` and `b`
    SLOW = "slow"  # everything that `a` says and computes
    LOST_CALL = "lost call"  # these and the following by chance: see Weather
    LOST_ANSWER = "lost answer"
    READ_FAILS = "failed read"
    READ_HANGS = "hanging read"
    READ_IS_WRONG = "wrong byte"
    LOST_NEWS = "lost news"


PLANNED = (
    FaultKind.KILL,
    FaultKind.STOP,
    FaultKind.PARTITION,
    FaultKind.ONE_WAY,
    FaultKind.BREAK,
    FaultKind.SLOW,
)


@dataclass(frozen=True, slots=True)
class Fault:
    """From `at` to `until`. A process dies or stops `after_steps` more steps of its own, so that it
    may happen at any await."""

    kind: FaultKind
    at: float
    until: float
    a: str
    b: str = ""
    after_steps: int = 0

    def __str__(self) -> str:
        who = f"{self.a} - {self.b}" if self.b else self.a
        return f"{self.kind} {who} until {self.until:.3f}"


@dataclass(frozen=True, slots=True)
class Weather:
    """What may happen to any message, call or read. Rates are probabilities, times seconds."""

    latency_s: float
    jitter_s: float
    slow_factor: float = 20.0
    break_rate: float = 0.0  # a message breaks its stream
    lost_call_rate: float = 0.0
    lost_answer_rate: float = 0.0  # a call is done, and its caller tries again
    read_delay_s: float = 0.0
    read_error_rate: float = 0.0
    read_corrupt_rate: float = 0.0
    read_hang_rate: float = 0.0
    lost_news_rate: float = 0.0  # one KvEvents is lost: its number is missing


@dataclass(frozen=True, slots=True)
class Machine:
    """One worker or store."""

    name: str
    num_blocks: int
    pace: Pace
    clock_offset: float = 0.0
    clock_rate: float = 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    """The cluster and how it is set up."""

    prefill: tuple[Machine, ...]
    decode: tuple[Machine, ...]
    stores: tuple[Machine, ...]
    conductors: tuple[Machine, ...]
    num_layers: int
    layer_groups: int
    max_num_seqs: int
    max_batch_tokens: int
    prefix_caching: bool
    verify: Verify
    local_tokens: int | None
    fleet_ttl_s: float
    lease_ttl_s: float
    registry: bool = False  # the conductors share one, and clients reconnect
    orphan_s: float = 3.0  # that an attempt without a conductor decodes on
    told: bool = True  # workers are told by flags where conductors are; else the registry does
    disk: DiskPlan | None = None  # of the store
    max_model_len: int = 128

    @property
    def machines(self) -> tuple[Machine, ...]:
        return (*self.prefill, *self.decode, *self.stores)


@dataclass(frozen=True, slots=True)
class Habits:
    """How a client goes about several conductors; it asks those one after the other, from number
    `first` on. Its connection is lost after so many tokens as `breaks` has."""

    first: int
    patience_s: float  # without a token, until a stream that has begun is given up
    breaks: tuple[int, ...]
    stays: bool  # then it comes back to the same conductor
    unnoticed_s: float  # that a conductor works on for a connection which was lost
    twice: float | None  # seconds until the same reconnect reaches another conductor, too


@dataclass(frozen=True, slots=True)
class Client:
    """One request. After `cancel_after` tokens its client goes away; one in a `hurry` may be too
    late even where nothing goes wrong."""

    name: str
    at: float
    prompt: tuple[int, ...]
    sampling: SamplingParams
    expected: tuple[int, ...]
    salt: str
    deadline_s: float = DEADLINE_S
    cancel_after: int | None = None
    hurry: bool = False
    habits: Habits | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    shape: Shape
    weather: Weather
    clients: tuple[Client, ...]
    probes: tuple[Client, ...]  # when all is well again
    faults: tuple[Fault, ...] = field(default=())


def make_plan(seed: int, disks: bool = True) -> Plan:
    """Without `disks` a seed means what it meant before stores had some."""
    rng = Random(seed)
    shape = _shape(rng)
    clients = _clients(rng, shape)
    # A probe repeats what may be cached everywhere.
    chosen = rng.sample(clients, min(2, len(clients)))
    probes = tuple(_probe(number, client) for number, client in enumerate(chosen))
    faults = tuple(sorted(_faults(rng, shape, clients), key=lambda fault: fault.at))
    plan = Plan(seed, shape, _weather(rng, shape), clients, probes, faults)
    return _with_disk(plan, Random(seed ^ 0xD15C)) if shape.stores and disks else plan


def _with_disk(plan: Plan, rng: Random) -> Plan:
    """One store in four has an NVMe tier. It is killed more often than others; and pools are small,
    prefill is slow, and earlier prompts come again when most workers have started anew, so that
    blocks are read from it."""
    if rng.random() >= 0.25:
        return plan
    disk, shape = draw_disk(rng), plan.shape
    (store,) = shape.stores

    def kill(name: str) -> Fault:
        at = rng.uniform(ARRIVALS_S / 2, TROUBLE_S)
        until = at + rng.choice((0.05, 0.3, 1.0))
        return Fault(FaultKind.KILL, at, until, name, after_steps=rng.choice((0, 1, 3, 8, 40)))

    def worker(machine: Machine) -> Machine:
        pace = replace(machine.pace, token_s=rng.uniform(0.005, 0.02))
        return replace(machine, num_blocks=rng.randint(18, 20), pace=pace)

    again = (
        replace(
            rng.choice(plan.clients), name=f"again{n}", at=rng.uniform(ARRIVALS_S, 2 * TROUBLE_S)
        )
        for n in range(rng.randint(4, 10))
    )
    first = kill(store.name)
    kills = [first, *(kill(one.name) for one in shape.machines if rng.random() < 0.7)]
    if rng.random() < 0.5:  # and again while it recovers
        at = first.until + rng.uniform(0.0, 8 * disk.call_s)
        kills.append(replace(first, at=at, until=at + 0.3, after_steps=rng.randint(0, 8)))
    return replace(
        plan,
        shape=replace(
            shape,
            prefill=tuple(map(worker, shape.prefill)),
            decode=tuple(map(worker, shape.decode)),
            stores=(replace(store, num_blocks=disk.slots),),
            prefix_caching=True,
            disk=disk,
        ),
        clients=(*plan.clients, *again),
        faults=tuple(sorted((*plan.faults, *kills), key=lambda fault: fault.at)),
    )


def _shape(rng: Random) -> Shape:
    num_prefill = rng.choice((0, 1, 1, 1, 2, 2))
    num_decode = rng.choice((1, 1, 2, 2, 2))
    tiny = rng.random() < 0.3

    def machine(name: str, blocks: tuple[int, int]) -> Machine:
        low, high = (18, 24) if tiny else blocks
        step_s = rng.choice((0.002, 0.01, 0.03)) * rng.uniform(0.7, 1.3)
        pace = Pace(step_s, rng.uniform(0.0002, 0.001), rng.random() < 0.3)
        skewed = rng.random() < 0.5
        return Machine(
            name,
            rng.randint(low, high),
            pace,
            rng.uniform(0, 1000) if skewed else 0.0,
            rng.uniform(0.99, 1.01) if skewed else 1.0,
        )

    max_num_seqs = rng.choice((1, 2, 4, 8))
    num_layers = rng.choice((2, 3, 4))
    return Shape(
        prefill=tuple(machine(f"p{n}", (32, 64)) for n in range(num_prefill)),
        decode=tuple(machine(f"d{n}", (32, 96)) for n in range(num_decode)),
        stores=tuple(machine("s0", (24, 48)) for _ in range(rng.random() < 0.5)),
        conductors=(machine(CONDUCTOR, (1, 1)),),
        num_layers=num_layers,
        layer_groups=rng.choice((1, 2)),
        max_num_seqs=max_num_seqs,
        max_batch_tokens=rng.choice((8, 16, 32)),
        prefix_caching=rng.random() < 0.9,
        verify=rng.choice((Verify.FULL, Verify.FULL, Verify.SAMPLE, Verify.OFF)),
        local_tokens=rng.choice((0, 0, 8, None)),
        fleet_ttl_s=rng.choice((2.0, 3.0)),
        lease_ttl_s=rng.choice((0.5, 1.5)),
    )


def _clients(rng: Random, shape: Shape) -> tuple[Client, ...]:
    salts = ("", "", "tenant")
    prefixes = [_tokens(rng, rng.randint(4, 20)) for _ in range(2)]
    clients: list[Client] = []
    for number in range(rng.randint(5, 10)):
        before = rng.choice(clients) if clients and rng.random() < 0.25 else None
        if (
            before and len(before.prompt) + len(before.expected) < 48
        ):  # the next turn of a conversation
            prompt, salt = (*before.prompt, *before.expected), before.salt
        else:
            prompt, salt = rng.choice(prefixes), rng.choice(salts)
        prompt = (*prompt, *_tokens(rng, rng.randint(1, 10)))
        cancelled, hurry = rng.random() < 0.15, rng.random() < 0.1
        room = 18 * BLOCK_SIZE - len(prompt)
        length = room if cancelled or hurry else min(room, rng.choice((1, 2, 4, 8, 12, 16, 20)))
        sampling = SamplingParams(
            temperature=rng.choice((0.0, 1.0)), seed=rng.getrandbits(64), max_tokens=length
        )
        clients.append(
            Client(
                name=f"r{number}",
                at=rng.uniform(0.0, ARRIVALS_S),
                prompt=prompt,
                sampling=sampling,
                expected=tuple(expected_answer(prompt, sampling, shape.num_layers)),
                salt=salt,
                deadline_s=rng.uniform(0.02, 1.0) if hurry else DEADLINE_S,
                cancel_after=rng.randint(0, 5) if cancelled else None,
                hurry=hurry,
            )
        )
    return tuple(clients)


def _tokens(rng: Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(count))


def _probe(number: int, client: Client) -> Client:
    length = min(8, client.sampling.max_tokens)
    sampling = SamplingParams(
        temperature=client.sampling.temperature, seed=client.sampling.seed, max_tokens=length
    )
    return Client(
        f"probe{number}", 0.0, client.prompt, sampling, client.expected[:length], client.salt
    )


def _weather(rng: Random, shape: Shape) -> Weather:
    latency_s = rng.choice((0.0002, 0.001, 0.005))
    calm = rng.random() < 0.3
    if calm:
        return Weather(latency_s, latency_s)

    def sometimes(rate: float) -> float:
        return rate if rng.random() < 0.3 else 0.0

    return Weather(
        latency_s=latency_s,
        jitter_s=latency_s * rng.choice((0.0, 1.0, 10.0)),
        break_rate=sometimes(0.002),
        lost_call_rate=sometimes(0.1),
        lost_answer_rate=sometimes(0.1),
        read_delay_s=rng.choice((0.0, 0.001, 0.05, 0.3)),
        read_error_rate=sometimes(0.05),
        read_corrupt_rate=sometimes(0.05) if shape.verify is not Verify.OFF else 0.0,
        read_hang_rate=sometimes(0.02),
        lost_news_rate=sometimes(0.1),
    )


def _faults(rng: Random, shape: Shape, clients: tuple[Client, ...]) -> list[Fault]:
    """Most of them while some request is on its way."""
    names = [machine.name for machine in shape.machines]
    faults = []
    for _ in range(rng.choice((0, 1, 2, 2, 3, 4, 5, 6))):
        kind = rng.choice(PLANNED)
        at = rng.uniform(0.05, TROUBLE_S)
        if rng.random() < 0.8:
            at = rng.choice(clients).at + rng.uniform(0.0, 0.4)
        duration = rng.choice((0.05, 0.3, 1.0, 3.0, 6.0)) * rng.uniform(0.5, 1.5)
        one = rng.choice(names)
        if kind in (FaultKind.KILL, FaultKind.STOP) and rng.random() < 0.1:
            one = CONDUCTOR
        other = rng.choice([*(name for name in names if name != one), CONDUCTOR, CONDUCTOR])
        if rng.random() < 0.5:
            one, other = other, one
        match kind:
            case FaultKind.KILL | FaultKind.STOP:
                process = one if one != CONDUCTOR or rng.random() < 0.1 else other
                steps = rng.choice((0, 1, 2, 3, 5, 8, 13, 40))
                faults.append(Fault(kind, at, at + duration, process, after_steps=steps))
            case FaultKind.SLOW:
                faults.append(Fault(kind, at, at + duration, one))
            case _:
                faults.append(Fault(kind, at, at + duration, one, other))
    return faults
