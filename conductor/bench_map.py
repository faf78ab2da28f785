"""The prefix map, as large as a big cluster makes it, on one core."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np

from baton.hashing import KEY_BYTES
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from conductor.bench_figures import Figure, Plan, latencies, timed
from conductor.prefix_map import PrefixMap

PART = "prefix map"
EVENT_BLOCKS = 100
STEADY_EVENTS = 20_000
SINGLE_EVENTS = 2_000
PROMPTS = 250  # different ones, so that none is in a cache when it comes
SYSTEM_BLOCKS = 64  # that every worker has
CROWD = 8  # workers that have half of a prompt
_PEER = "Dynamo's tree: 12k-36k"


@dataclass(slots=True)
class _Cluster:
    """Workers that send events with numbers and random keys."""

    view: PrefixMap
    names: list[str]
    random: np.random.Generator
    numbers: list[int] = field(default_factory=list)

    def join(self) -> None:
        self.numbers = [1] * len(self.names)
        for name in self.names:
            self.view.apply(name, KvSnapshot(0, Tier.GPU, b"", first=True, last=True))

    def keys(self, blocks: int) -> bytes:
        return self.random.bytes(blocks * KEY_BYTES)

    def send(self, worker: int, added: bytes, removed: bytes = b"") -> None:
        worker %= len(self.names)
        message = KvEvents(self.numbers[worker], Tier.GPU, added, removed)
        self.numbers[worker] += 1
        if not self.view.apply(self.names[worker], message):
            raise AssertionError("the map missed a message")


def measure(plan: Plan) -> Iterator[Figure]:
    # Room for the events that come with look-ups.
    view = PrefixMap(plan.blocks + 6 * PROMPTS * EVENT_BLOCKS + plan.prompt_blocks)
    names = [f"worker-{number}" for number in range(plan.workers)]
    cluster = _Cluster(view, names, np.random.default_rng(plan.seed))
    cluster.join()
    prompts = _send_prompts(cluster, plan)
    oldest: list[bytes] = []
    yield from _fill(cluster, plan, oldest)
    yield from _replace(cluster, oldest)
    yield Figure(PART, "memory per block", view.memory_bytes / view.num_blocks, "bytes", "<= 100")
    yield from _match(cluster, plan, prompts)
    yield from _match_uneven(cluster, plan)
    (seconds,) = timed([partial(view.drop, names[0])])
    yield Figure(PART, "drop of a worker", seconds * 1e6, "µs")
    yield Figure(PART, "blocks that found no room", view.dropped, "", "0")


def _send_prompts(cluster: _Cluster, plan: Plan) -> list[bytes]:
    """A system prompt that all have, half of each prompt that a few have, the rest that one has."""
    system = cluster.keys(min(SYSTEM_BLOCKS, plan.prompt_blocks))
    for worker in range(plan.workers):
        cluster.send(worker, system)
    prompts = []
    for number in range(min(PROMPTS, plan.blocks // (2 * plan.prompt_blocks))):
        prompt = system + cluster.keys(plan.prompt_blocks - len(system) // KEY_BYTES)
        half = len(prompt) // KEY_BYTES // 2 * KEY_BYTES
        for other in range(CROWD):
            cluster.send(number * CROWD + other, prompt[len(system) : half])
        cluster.send(number * CROWD, prompt[half:])
        prompts.append(prompt)
    return prompts


def _fill(cluster: _Cluster, plan: Plan, oldest: list[bytes]) -> Iterator[Figure]:
    """Events of new blocks from all workers in turn, until there are as many as planned."""
    seconds, events, slowest, most_cpu = 0.0, 0, 0.0, 0.0
    while (missing := plan.blocks - cluster.view.num_blocks) > 0:
        count = max(min(missing // EVENT_BLOCKS, 10_000), 1)
        batch = [cluster.keys(EVENT_BLOCKS) for _ in range(count)]
        for number, added in enumerate(batch):
            cpu, begin = time.thread_time(), time.perf_counter()
            cluster.send(events + number, added)
            took = time.perf_counter() - begin
            seconds, slowest = seconds + took, max(slowest, took)
            most_cpu = max(most_cpu, time.thread_time() - cpu)
        events += count
        oldest += batch[: STEADY_EVENTS - len(oldest)]
    name = f"events of {EVENT_BLOCKS} new blocks"
    yield Figure(PART, name, events / seconds, "/s", _PEER)
    yield Figure(PART, f"{name}, slowest", slowest * 1e6, "µs", "with waits for a core")
    yield Figure(PART, f"{name}, most CPU time", most_cpu * 1e6, "µs", "no rehash")


def _replace(cluster: _Cluster, oldest: list[bytes]) -> Iterator[Figure]:
    """Full workers: every new block takes the place of an old one."""
    batch = [(number, cluster.keys(EVENT_BLOCKS), old) for number, old in enumerate(oldest)]
    samples = timed(partial(cluster.send, *event) for event in batch)
    name = f"events of {EVENT_BLOCKS} new and {EVENT_BLOCKS} removed"
    yield Figure(PART, name, len(samples) / sum(samples), "/s", _PEER)
    # From one worker, additions cannot be taken together with those after its removals.
    own = [cluster.keys(EVENT_BLOCKS) for _ in range(SINGLE_EVENTS)]
    samples = timed(partial(cluster.send, 0, new, old) for old, new in pairwise([b"", *own]))
    yield Figure(PART, f"{name}, of one worker", len(samples) / sum(samples), "/s")


def _match(cluster: _Cluster, plan: Plan, prompts: list[bytes]) -> Iterator[Figure]:
    """Look-ups of long prompts, each after an event that is still to be applied."""
    part = KEY_BYTES * plan.prompt_blocks
    cases: dict[str, Callable[[bytes], bytes]] = {
        "all known": lambda prompt: prompt,
        "half known": lambda prompt: prompt[: part // 2] + cluster.keys(plan.prompt_blocks // 2),
        "system prompt known": lambda prompt: (
            prompt[: SYSTEM_BLOCKS * KEY_BYTES] + cluster.keys(plan.prompt_blocks - SYSTEM_BLOCKS)
        ),
        "nothing known": lambda _: cluster.keys(plan.prompt_blocks),
    }
    for case, make in cases.items():
        samples = []
        for number, prompt in enumerate(prompts):
            chain = make(prompt)
            cluster.send(number, cluster.keys(EVENT_BLOCKS))
            samples += timed([partial(cluster.view.matches, chain)])
        name = f"matches, {plan.prompt_tokens} tokens, {case}"
        yield from latencies(PART, name, sorted(samples), "< 1000")
    samples = timed([partial(cluster.view.matches, prompts[0])] * len(prompts))
    yield from latencies(PART, "the same prompt again and again", samples, "")
    found = cluster.view.matches(prompts[0])
    yield Figure(PART, "holders in its answer", len(list(found)), "")


def _match_uneven(cluster: _Cluster, plan: Plan) -> Iterator[Figure]:
    """The worst that chains bring: one that each worker has another part of."""
    chain = cluster.keys(plan.prompt_blocks)
    lengths = cluster.random.integers(1, plan.prompt_blocks + 1, plan.workers)
    for worker, length in enumerate(lengths.tolist()):
        cluster.send(worker, chain[: length * KEY_BYTES])
    samples = timed([partial(cluster.view.matches, chain)] * PROMPTS)
    yield from latencies(PART, "a prompt that each worker has another part of", samples, "")
