"""What must hold in every run, and when a request may end in an error.

A request must get its answer, unless
  - its client went away                                       (cancelled),
  - its deadline was so short that the plan says so            (deadline_exceeded),
  - its conductor was killed                                   (conductor_lost),
  - incidents were at work when it ended and for TROUBLE_S before, or RetryOptions.failures of them
    hit it: its attempts failed one after the other            (a retryable error),
  - two incidents that can amount to a worker's death hit it   (poison_request),
  - the conductor had come back, and incidents since then kept
    its workers from telling it of themselves                  (no_worker), or
  - incidents left it less healthy time than NEEDED_S          (deadline_exceeded).

An incident is at work until LAG_S after its end: so long may it take until everybody has noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from baton.errors import BatonError, DeadlineExceeded, NoWorker, PoisonRequest
from baton.types.fleet import BlockState
from conductor.retries import RetryOptions
from kvstore.service import StoreService
from prefill_worker.service import PrefillService
from sim.clients import CONDUCTOR_LOST, Story, right_text
from sim.cluster import Cluster, Hosted, HostedConductor
from sim.network import KEEPALIVE_S, Incident
from sim.plan import Client, FaultKind, Shape
from sim.process import Process

TROUBLE_S = 0.7  # which the pauses between RetryOptions.failures attempts take at least
NEWS_S = 2.5  # until a conductor that came back knows its workers
RELEASE_S = 0.5  # in which a cluster without faults lets go of a request that has ended, at least
LEASE_SLACK_S = 0.3  # after its time to live, for a lease to end
GRACE_S = 0.5  # that an end may come after its deadline
NEEDED_S = 10.0  # of a cluster without faults, which is ample for any request
LAG_S = KEEPALIVE_S + 3.0  # until everybody has noticed what happened

RETRYABLE = {kind.code for kind in BatonError.__subclasses__() if kind.retryable}
RETRYABLE |= {"digest_mismatch"}
LOOK_DEADLY = {FaultKind.KILL, FaultKind.STOP, FaultKind.PARTITION, FaultKind.ONE_WAY}


class Ending(Protocol):
    """Of a request, or of one connection of its client."""

    @property
    def client(self) -> Client: ...
    @property
    def conductor(self) -> str: ...
    @property
    def code(self) -> str: ...
    @property
    def began(self) -> float: ...
    @property
    def ended(self) -> float: ...


def check_story(story: Story, incidents: Sequence[Incident], halted_s: float) -> list[str]:
    """What is wrong with it. `halted_s`: the conductor stood still for so long meanwhile."""
    wrong = check_answer(story)
    name = story.client.name
    if story.code not in ("", "ok", "cancelled") and not is_legitimate(story, incidents):
        wrong.append(f"{name} failed for no good reason: {story.code} {story.message}")
    if story.ends != (story.code not in ("cancelled", CONDUCTOR_LOST)):
        wrong.append(f"{name} had {story.ends} terminal events and ended with {story.code!r}")
    if story.ended - story.began > story.client.deadline_s + GRACE_S + halted_s:
        wrong.append(f"{name} ended {story.ended - story.began:.3f} s after it began")
    return wrong


def check_answer(story: Story) -> list[str]:
    """What is wrong with what the client got."""
    client, name = story.client, story.client.name
    wrong = []
    expected = list(client.expected)
    if story.tokens != expected[: len(story.tokens)]:
        wrong.append(f"{name} got {story.tokens}, not {expected}")
    if not story.code:
        wrong.append(f"{name} never ended")
    elif story.code == "ok":
        if story.tokens != expected or story.text != right_text(expected):
            wrong.append(f"{name} ended well with {story.tokens} {story.text!r}, not {expected}")
        if story.usage is None or story.usage.completion_tokens != len(expected):
            wrong.append(f"{name} has used {story.usage}, not {len(expected)} tokens")
    elif story.code == "cancelled" and client.cancel_after is None:
        wrong.append(f"{name} was cancelled by nobody")
    return wrong


def is_legitimate(story: Ending, incidents: Sequence[Incident]) -> bool:
    """Whether the error may be."""
    if story.code == CONDUCTOR_LOST:
        return any(
            one.kind is FaultKind.KILL and one.who == story.conductor
            for one in _during(story, incidents)
        )
    if story.code == DeadlineExceeded.code and story.client.hurry:
        return True
    if story.code == DeadlineExceeded.code:
        troubled = _union(_during(story, incidents), story)
        return story.client.deadline_s - troubled < NEEDED_S
    during = _during(story, incidents)
    if story.code == PoisonRequest.code:
        return sum(one.kind in LOOK_DEADLY for one in during) >= RetryOptions().deaths
    if story.code == NoWorker.code:
        return any(
            one.at <= story.ended <= _knows_nobody_until(one, incidents)
            for one in incidents
            if one.kind is FaultKind.KILL and one.who == story.conductor
        )
    if story.code not in RETRYABLE:
        return False
    if len(during) >= RetryOptions().failures:
        return True
    now = [one for one in during if one.until + LAG_S >= story.ended]
    return bool(now) and _union(during, story) >= TROUBLE_S


def _during(story: Ending, incidents: Iterable[Incident], and_s: float = 0.0) -> list[Incident]:
    """What was at work while it ran, and up to `and_s` after its end."""
    end = story.ended + and_s
    return [one for one in incidents if one.at <= end and one.until + LAG_S >= story.began]


def _knows_nobody_until(kill: Incident, incidents: Iterable[Incident]) -> float:
    """When a conductor that came back after `kill` knows of a worker at the latest: NEWS_S later,
    or when an unbroken chain of incidents has ended that may have kept them apart."""
    end = kill.until + NEWS_S
    for one in sorted(incidents, key=lambda one: one.at):
        if one.at <= end and one.until >= kill.until:
            end = max(end, one.until + LAG_S)
    return end


def _union(incidents: Iterable[Incident], story: Ending) -> float:
    """Seconds of the request's life in which some incident was at work."""
    total, end = 0.0, story.began
    for one in sorted(incidents, key=lambda one: one.at):
        begin, until = max(one.at, end), min(one.until + LAG_S, story.ended)
        total += max(0.0, until - begin)
        end = max(end, until)
    return total


def release_s(shape: Shape) -> float:
    """RELEASE_S, or more where two steps are longer: the running one, and the one behind it that a
    device with a queue does not give back."""
    tokens = shape.max_batch_tokens
    step_s = max(one.pace.step_s + one.pace.token_s * tokens for one in shape.machines)
    return max(RELEASE_S, 2 * step_s + 0.1)


def check_released(cluster: Cluster, story: Story) -> list[str]:
    """After `release_s` nobody works on a request that has ended, unless some fault is to blame:
    also one that came before its conductor had noticed that the client is gone."""
    waited_s = release_s(cluster.shape)
    if _during(story, cluster.network.incidents, cluster.network.now() - story.ended):
        return []
    name = story.client.name
    return [
        f"{worker} still works on {attempt}, which ended {waited_s:.1f} s ago"
        for worker, hosted in cluster.workers.items()
        for attempt in hosted.service.links.attempts
        if attempt.request_id.startswith(f"{name}~")
    ]


def check_leases(cluster: Cluster, now: float) -> list[str]:
    """No lease outlives its time when whoever reads has fallen silent."""
    wrong = []
    limit_s = cluster.shape.lease_ttl_s + LEASE_SLACK_S
    for name, hosted in cluster.workers.items():
        service = hosted.service
        if not isinstance(service, PrefillService) or hosted.process.halted:
            continue
        for attempt in service.published:
            renewed_at = cluster.network.renewed_at(name, attempt)
            if renewed_at is None:
                continue
            silent_s = now - max(renewed_at, hosted.process.went_on_at)
            if silent_s > limit_s:
                wrong.append(f"{name} keeps {attempt} leased, {silent_s:.2f} s after its renewal")
    return wrong


def is_idle(hosted: Hosted) -> bool:
    load = hosted.service.load()
    settled = load.blocks_in(BlockState.FREE, BlockState.CACHED)
    return (load.running, load.waiting) == (0, 0) and settled == sum(n for _, n in load.blocks)


def check_books(cluster: Cluster) -> list[str]:
    """When all should be idle: blocks, leases, loans, streams' attempts, and the prefix map."""
    wrong = []
    for name, hosted in cluster.workers.items():
        if not is_idle(hosted):
            wrong.append(f"{name} is not idle: {hosted.service.load()}")
        try:
            hosted.process.do(hosted.check_integrity)
        except BatonError as error:
            wrong.append(f"the books of {name} are wrong: {error.message}")
    for disk in cluster.disks.values():
        wrong += disk.check()
    for hosted_conductor in cluster.conductors.values():
        wrong += _check_map(cluster, hosted_conductor)
    return wrong


def _check_map(cluster: Cluster, conductor: HostedConductor) -> list[str]:
    """What the conductor knows of blocks is what their holders have."""
    known = conductor.service.fleet.prefix_map
    wrong, total, all_told = [], 0, True
    for name, hosted in cluster.workers.items():
        if not cluster.network.knows_of_loss(name, conductor.process.name):
            all_told = False
            continue
        for tier, keys in holdings(hosted):
            total += len(keys)
            missing = [key for key in keys if (name, tier) not in known.holders(key)]
            if missing:
                lacking = f"lacks {len(missing)} blocks of {name}"
                wrong.append(f"the prefix map of {conductor.process.name} {lacking}")
    if all_told and known.num_entries != total:
        wrong.append(f"the prefix map has {known.num_entries} entries, the holders {total} blocks")
    return wrong


def holdings(hosted: Hosted) -> list[tuple[object, list[bytes]]]:
    service = hosted.service
    news = service.links._news if isinstance(service, StoreService) else service.sharing.news
    if news is None:
        return []
    return [
        (tier, [keys[at : at + 16] for at in range(0, len(keys), 16)])
        for tier, keys in news.holdings()
    ]


def check_gone(process: Process) -> list[str]:
    """After an orderly end nothing of a process is left."""
    names = [task.get_name() for task in process.tasks()]
    return [f"{process.incarnation} ended and left {names}"] if names else []
