"""What workers count of their work: steps, tokens, hits, handoffs, fetches, leases, late news."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.engine.batch import Batch
from baton.engine.figures import Source, StepKind
from baton.kv.blocks.figures import LoanEnd
from baton.kv.handoff.figures import Outcome
from baton.kv.handoff.leases import Ending
from baton.kv.identity import Identity
from baton.kv.transport.loopback import Fault
from baton.types.fleet import Peer, Role
from baton.types.kv_events import Tier
from baton.types.link import FetchPart, StartDecode, StartPrefill
from baton.worker.metrics import WorkerMetrics
from tests.unit.metrics_kit import WORKER_LOAD, families_of
from tests.unit.test_worker_services import Reads, make_task, start
from tests.unit.test_worker_sharing import DECODER, next_turn
from tests.unit.worker_rig import LAYOUT, OPTIONS, running_pair


async def test_a_handed_over_request_is_counted_on_both_sides() -> None:
    async with running_pair() as pair:
        task = make_task("x", prompt_len=30, max_tokens=6)
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        ours, theirs = pair.prefill_metrics, pair.decode_metrics
        assert ours.engine.tokens[StepKind.PREFILL] == 30
        assert theirs.engine.tokens[StepKind.DECODE] == 5
        assert theirs.engine.tokens[StepKind.PREFILL] == 0
        assert ours.engine.steps[StepKind.PREFILL].count == 2  # of 16 tokens at most
        assert theirs.engine.steps[StepKind.DECODE].count == 5
        assert (ours.engine.queue.count, ours.engine.prefill.count) == (1, 1)
        assert theirs.engine.queue.count == 0  # it had its first token when it came
        assert theirs.handoff.taken[Outcome.DONE] == 1
        assert theirs.handoff.bytes.value == 8 * LAYOUT.block_bytes
        assert (theirs.handoff.seconds.count, theirs.handoff.exposed.count) == (1, 1)
        assert 0 <= theirs.handoff.exposed.sum <= theirs.handoff.seconds.sum < 20
        assert ours.handoff.leases[Ending.RELEASED] == 1
        assert ours.kv_event_lag.count > 0
        assert ours.kv_event_lag.sum < 20


async def test_hits_are_counted_by_where_they_were() -> None:
    async with running_pair() as pair:
        task = make_task("x", prompt_len=30, max_tokens=9)
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        again = next_turn(pair, task)
        fetch = (FetchPart(DECODER, 7, 2, Tier.GPU),)
        await pair.to_prefill.send(StartPrefill(again, fetch))
        await pair.to_decode.send(StartDecode(again, pair.peer))
        await pair.to_decode.finish(again.attempt)
        ours, theirs = pair.prefill_metrics, pair.decode_metrics
        assert ours.engine.hits[Source.POOL] == 7 * 4
        assert ours.engine.hits[Source.GPU] == 2 * 4
        assert ours.engine.tokens[StepKind.PREFILL] == 30 + 42 - 36
        assert ours.fetches.bytes[Tier.GPU] == 2 * LAYOUT.block_bytes
        assert ours.fetches.seconds[Tier.GPU].count == 1
        assert ours.fetches.failures[Tier.GPU] == 0
        assert theirs.loans.ended[LoanEnd.RETURNED] == 1


async def test_a_fetch_that_brings_nothing_is_a_failure() -> None:
    async with running_pair() as pair:
        task = make_task("x", prompt_len=30)
        nobody = FetchPart(Peer("n", "n-life", "nowhere:1"), 0, 5, Tier.CPU)
        await pair.to_prefill.send(StartPrefill(task, (nobody,)))
        await pair.to_decode.send(StartDecode(task, pair.peer))
        await pair.to_decode.finish(task.attempt)
        ours = pair.prefill_metrics
        assert ours.fetches.failures[Tier.CPU] == 1
        assert ours.engine.hits[Source.CPU] == ours.fetches.bytes[Tier.CPU] == 0


async def test_a_lease_that_expires_is_counted() -> None:
    async with running_pair(options=replace(OPTIONS, lease_ttl_s=0.2)) as pair:
        task = make_task("t")
        await pair.to_prefill.send(StartPrefill(task))
        await pair.to_prefill.finish(task.attempt)
        assert pair.prefill_metrics.handoff.leases[Ending.EXPIRED] == 1
        assert pair.prefill_metrics.handoff.leases[Ending.RELEASED] == 0


async def test_a_handoff_that_fails_is_counted() -> None:
    async with running_pair(Reads(Fault(error="the cable was cut"))) as pair:
        task = make_task("t")
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        assert pair.decode_metrics.handoff.taken[Outcome.FAILED] == 1
        assert pair.decode_metrics.handoff.taken[Outcome.DONE] == 0


async def test_an_answer_of_one_token_needs_no_handoff() -> None:
    async with running_pair() as pair:
        task = make_task("t", max_tokens=1)
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        assert pair.decode_metrics.handoff.taken[Outcome.NOT_NEEDED] == 1
        assert pair.decode_metrics.handoff.taken[Outcome.FAILED] == 0


async def test_a_step_that_fails_is_counted() -> None:
    def broken(batch: Batch) -> None:
        if batch.step == 1:
            raise RuntimeError("the device is gone")

    async with running_pair(before_prefill=broken) as pair:
        task = make_task("t", prompt_len=4)
        await pair.to_prefill.send(StartPrefill(task))
        await pair.to_prefill.finish(task.attempt)
        assert pair.prefill_metrics.engine.failed_steps.value == 1


def test_what_was_followed_before_is_not_exported_any_more() -> None:
    """A worker in another role is the same process, with another service."""
    metrics = WorkerMetrics()
    assert "baton_worker_blocks" not in families_of(metrics.own.render().decode())
    for name in ("one", "other"):
        metrics.follow(Identity(name, "life", LAYOUT), Role.DECODE, lambda: WORKER_LOAD)
    text = metrics.own.render().decode()
    assert 'worker="other"' in text
    assert 'worker="one"' not in text


@pytest.mark.parametrize("tier", list(Tier))
def test_every_tier_is_a_source(tier: Tier) -> None:
    assert Source.of(tier).value == tier.value
