"""What must hold when there are several conductors and clients that reconnect.

One conductor's death is no reason for a request to fail: its client goes on at another one. So a
request may end badly only if each of its connections since the last token did so for a reason that
would be good enough with one conductor (`checks.py`), and incidents elsewhere do not count:
  - the conductor was down, or the connection was broken on purpose   (conductor_lost), or
  - it stood still, or its workers were in trouble                     (silent), or
  - what `is_legitimate` allows.
That somebody else has the request (`taken_over`) is no reason: then that one ends it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from baton.errors import DeadlineExceeded, NoWorker, TakenOver
from baton.rpc.registry_memory import ADDRESS as REGISTRY
from baton.types.request import AttemptId
from sim.checks import GRACE_S, LAG_S, check_answer, is_legitimate
from sim.clients import CONDUCTOR_LOST, NO_END, SILENT, Failure, Story
from sim.cluster import Cluster
from sim.network import Incident
from sim.plan import Shape

ORPHAN_SLACK_S = 0.3
LONG_S = 8.0  # without a token: nobody waits for his turn so long
UNTOLD = ("cancelled", CONDUCTOR_LOST, SILENT, NO_END)  # ends without a word of the cluster


def check_story_of_several(story: Story, incidents: Sequence[Incident], shape: Shape) -> list[str]:
    """What is wrong with it, over all connections together."""
    wrong = check_answer(story)
    name = story.client.name
    if story.code not in ("", "ok", "cancelled") and not _is_excused(story, incidents, shape):
        why = "; ".join(f"{one.code} at {one.conductor}" for one in story.failures)
        wrong.append(f"{name} failed for no good reason: {story.code} {story.message} ({why})")
    for silence in story.silences:
        long = silence.ended - silence.began > LONG_S
        if long and not _may_fail(silence, incidents, shape):
            wrong.append(f"{name} heard nothing from {silence.conductor} for no good reason")
    if story.ends > 1 or (story.ends == 0 and story.code not in UNTOLD):
        wrong.append(f"{name} had {story.ends} terminal events and ended with {story.code!r}")
    if story.ended - story.began > story.client.deadline_s + GRACE_S:
        wrong.append(f"{name} ended {story.ended - story.began:.3f} s after it began")
    return wrong


def _is_excused(story: Story, incidents: Sequence[Incident], shape: Shape) -> bool:
    if story.code in (NO_END, DeadlineExceeded.code):
        here = _about(incidents, [m.name for m in (*shape.conductors, *shape.machines)])
        return is_legitimate(_late(story), here)
    return bool(story.failures) and all(
        _may_fail(failure, incidents, shape) for failure in story.failures
    )


def _late(story: Story) -> Failure:
    return Failure(story.client, story.conductor, DeadlineExceeded.code, story.began, story.ended)


def _may_fail(failure: Failure, incidents: Sequence[Incident], shape: Shape) -> bool:
    if failure.code == CONDUCTOR_LOST:  # nothing but an incident breaks a connection
        return True
    if failure.code == TakenOver.code:
        return False
    known = [failure.conductor, *(machine.name for machine in shape.machines)]
    if failure.code == NoWorker.code:  # workers may look for conductors in the registry
        known.append(REGISTRY)
    here = _about(incidents, known)
    if failure.code == SILENT:
        return any(one.at <= failure.ended and one.until + LAG_S >= failure.began for one in here)
    return is_legitimate(failure, here)


def _about(incidents: Iterable[Incident], names: Sequence[str]) -> list[Incident]:
    """Those between any of these, and of nobody else."""
    return [one for one in incidents if all(name in names for name in one.who.split(" - "))]


class OrphanWatch:
    """An attempt that decodes and belongs to no conductor ends in time."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._since: dict[tuple[str, AttemptId], float] = {}

    def check(self, now: float) -> list[str]:
        """To be called often."""
        seen = {}
        wrong = []
        limit_s = self._cluster.shape.orphan_s + ORPHAN_SLACK_S
        for hosted in self._cluster.workers.values():
            process = hosted.process
            for attempt in hosted.service.links.orphans:
                key = (process.incarnation, attempt)
                since = seen[key] = max(self._since.get(key, now), process.went_on_at)
                if not process.halted and now - since > limit_s:
                    wrong.append(f"{process.incarnation} keeps the orphan {attempt}")
        self._since = seen
        return wrong


def check_withdrawn(cluster: Cluster) -> list[str]:
    """After an orderly end of all conductors."""
    registry = cluster.registry
    known = registry.leases.live() if registry is not None else {}
    lives = [conductor.process.incarnation for conductor in cluster.conductors.values()]
    return [f"{life} has ended and is announced" for life in lives if life in known]


def check_registry_empty(cluster: Cluster) -> list[str]:
    """When all conductors have gone, and the time of every record has passed."""
    registry = cluster.registry
    assert registry is not None
    left = [*registry.leases.live(), *registry.requests.live()]
    return [f"the registry still has {left}"] if left else []
