"""The same plan with several conductors, which share a registry, and clients that reconnect.

What is added is drawn from a generator of its own: a seed of the plan with one conductor keeps its
meaning, and its cluster, weather and faults are those of the same seed here.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from baton.rpc.registry_memory import ADDRESS as REGISTRY
from sim.plan import (
    BLOCK_SIZE,
    TROUBLE_S,
    Client,
    Fault,
    FaultKind,
    Habits,
    Machine,
    Plan,
    Shape,
    make_plan,
)
from sim.runner import expected_answer

SHORT_ORPHAN_S = 0.3
ROOM = 18 * BLOCK_SIZE  # tokens: of the smallest pool


def make_plan_of_several(seed: int) -> Plan:
    rng = Random(seed ^ 0xC0D0)
    plan = make_plan(seed)
    shape = _shape(rng, plan.shape)
    if seed % 4 == 3:  # orphans are given up before their answers end
        shape = replace(shape, orphan_s=SHORT_ORPHAN_S)
    clients = tuple(_client(rng, client, shape) for client in plan.clients)
    faults = (*plan.faults, *(_fault(rng, shape, clients) for _ in range(rng.choice(_NUMBERS))))
    return replace(
        plan,
        shape=shape,
        clients=clients,
        probes=_probes(rng, plan, shape),
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
    )


_NUMBERS = (0, 1, 1, 2, 2, 3, 4)  # of faults of conductors and the registry


def _shape(rng: Random, shape: Shape) -> Shape:
    first = shape.conductors[0]
    more = (
        Machine(f"c{number}", 1, first.pace, rng.uniform(0, 1000), rng.uniform(0.99, 1.01))
        for number in range(1, rng.choice((1, 2, 2, 2, 2, 2, 3, 3)))
    )
    return replace(shape, conductors=(first, *more), registry=True, told=rng.random() < 0.3)


def _client(rng: Random, client: Client, shape: Shape) -> Client:
    """With habits, and often a longer answer, so that there is something to take over."""
    breaks = rng.choice((0, 0, 0, 1, 2))
    habits = Habits(
        first=rng.randrange(len(shape.conductors)),
        patience_s=rng.choice((2.0, 4.0, 8.0)),
        breaks=tuple(sorted(rng.randint(1, 24) for _ in range(breaks))),
        stays=rng.random() < 0.5,
        unnoticed_s=rng.choice((0.0, 0.0, 0.3, 2.0)),
        twice=rng.choice((None, None, 0.0, rng.uniform(0.0, 0.3))),
    )
    longer = rng.choice((0, 0, 24, 40))
    length = min(ROOM - len(client.prompt), longer)
    if client.hurry or client.cancel_after is not None or length <= client.sampling.max_tokens:
        return replace(client, habits=habits)
    sampling = replace(client.sampling, max_tokens=length)
    expected = expected_answer(client.prompt, sampling, shape.num_layers)
    return replace(client, habits=habits, sampling=sampling, expected=tuple(expected))


def _probes(rng: Random, plan: Plan, shape: Shape) -> tuple[Client, ...]:
    """One for each conductor: any of them serves any request."""
    probes = (plan.probes[n % len(plan.probes)] for n in range(len(shape.conductors)))
    return tuple(
        replace(probe, name=f"probe{first}", habits=Habits(first, 8.0, (), False, 0.0, None))
        for first, probe in enumerate(probes)
    )


_CONDUCTOR_FAULTS = (
    FaultKind.KILL,
    FaultKind.KILL,
    FaultKind.STOP,
    FaultKind.PARTITION,
    FaultKind.ONE_WAY,
    FaultKind.BREAK,
    FaultKind.SLOW,
)
_REGISTRY_FAULTS = (
    FaultKind.KILL,  # and comes back empty
    FaultKind.STOP,
    FaultKind.PARTITION,  # from one process
    FaultKind.SLOW,
)


def _fault(rng: Random, shape: Shape, clients: tuple[Client, ...]) -> Fault:
    at = rng.uniform(0.05, TROUBLE_S)
    if rng.random() < 0.8:
        at = rng.choice(clients).at + rng.uniform(0.0, 1.0)
    until = at + rng.choice((0.05, 0.3, 1.0, 3.0, 6.0)) * rng.uniform(0.5, 1.5)
    conductor = rng.choice(shape.conductors).name
    machine = rng.choice(shape.machines).name
    if rng.random() < 0.3:
        kind = rng.choice(_REGISTRY_FAULTS)
        other = rng.choice((conductor, conductor, machine)) if kind is FaultKind.PARTITION else ""
        return Fault(kind, at, until, REGISTRY, other)
    kind = rng.choice(_CONDUCTOR_FAULTS)
    match kind:
        case FaultKind.KILL | FaultKind.STOP:
            return Fault(kind, at, until, conductor, after_steps=rng.choice((0, 1, 3, 8, 40)))
        case FaultKind.SLOW:
            return Fault(kind, at, until, conductor)
        case FaultKind.ONE_WAY if rng.random() < 0.5:
            return Fault(kind, at, until, machine, conductor)
    return Fault(kind, at, until, conductor, machine)
