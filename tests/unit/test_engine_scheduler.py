"""The scheduler without a loop: what a step contains, who makes way, who waits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.engine.sequence import Ending, Sequence
from baton.engine.waiting import Line, WaitingLine
from baton.errors import ConfigError, InternalError, InvalidRequest, Overloaded
from baton.types.fleet import BlockState
from baton.types.request import AttemptId, FinishReason
from tests.fake_runner import expected_answer
from tests.scheduler_rig import make_rig, make_task, shape

# -- what a step contains -------------------------------------------------------------------


def test_chunks_share_the_budget_and_end_on_block_boundaries() -> None:
    rig = make_rig(max_batch_tokens=10)
    rig.submit(make_task(14))
    rig.submit(make_task(5, start=100))
    assert shape(rig.step()) == [(1, 0, 8), (2, 0, 2)]  # too little is left to reach a boundary
    assert shape(rig.step()) == [(1, 8, 6), (2, 2, 3)]
    assert shape(rig.step()) == [(1, 14, 1), (2, 5, 1)]


def test_decodes_come_first() -> None:
    rig = make_rig(max_batch_tokens=8)
    rig.submit(make_task(20))
    rig.step()
    rig.submit(make_task(3, start=100, priority=-1))
    assert shape(rig.step()) == [(2, 0, 3), (1, 8, 4)]  # the more urgent one goes first
    rig.submit(make_task(9, start=200, priority=-2))
    assert shape(rig.step()) == [(2, 3, 1), (3, 0, 4), (1, 12, 3)]


def test_chunks_are_shorter_while_others_decode() -> None:
    rig = make_rig(max_prefill_tokens=5)
    rig.submit(make_task(14, max_tokens=3))
    assert shape(rig.step()) == [(1, 0, 14)]
    rig.submit(make_task(12, start=100))
    assert shape(rig.step()) == [(1, 14, 1), (2, 0, 4)]
    assert shape(rig.step()) == [(1, 15, 1), (2, 4, 4)]
    assert shape(rig.step()) == [(2, 8, 4)]
    rig.drain()


def test_with_prompts_first_decodes_wait_while_there_are_prompts() -> None:
    rig = make_rig(max_batch_tokens=8, prompts_first=True)
    rig.submit(make_task(8))
    assert shape(rig.step()) == [(1, 0, 8)]
    rig.submit(make_task(12, start=100))
    assert shape(rig.step()) == [(2, 0, 8)]
    rig.submit(make_task(6, start=200))
    assert shape(rig.step()) == [(2, 8, 4), (3, 0, 4)]
    assert shape(rig.step()) == [(3, 4, 2)]
    assert shape(rig.step()) == [(1, 8, 1), (2, 12, 1), (3, 6, 1)]
    rig.drain()


def test_with_prompts_first_decodes_go_on_when_no_prompt_fits() -> None:
    rig = make_rig(num_blocks=6, prompts_first=True)
    rig.submit(make_task(15, max_tokens=3))
    rig.step()
    rig.submit(make_task(8, start=100))  # two blocks are free, and the first needs one to grow
    assert [shape(rig.step()) for _ in range(2)] == [[(1, 15, 1)], [(1, 16, 1)]]
    assert shape(rig.step()) == [(2, 0, 8)]
    rig.drain()


def test_with_prompts_first_the_step_behind_a_prompt_decodes_it() -> None:
    rig = make_rig(prompts_first=True)
    rig.submit(make_task(4))
    prompt, decode = rig.schedule(), rig.schedule()
    assert shape(decode) == [(1, 4, 1)]
    assert prompt is not None
    rig.commit(prompt)
    rig.submit(make_task(5, start=100))
    assert shape(rig.schedule()) == [(2, 0, 5)]


def test_with_prompts_first_a_place_that_becomes_free_mixes_no_prompt_into_a_step() -> None:
    rig = make_rig(max_num_seqs=2, prompts_first=True)
    rig.submit(make_task(4, max_tokens=2))
    rig.submit(make_task(4, start=100))
    rig.step()
    rig.submit(make_task(4, start=200))
    last, behind = rig.schedule(), rig.schedule()
    assert shape(last) == [(1, 4, 1), (2, 4, 1)]
    assert shape(behind) == [(2, 5, 1)]  # the first needs its place no more
    assert last is not None
    rig.commit(last)
    assert shape(rig.schedule()) == [(3, 0, 4)]


def test_priority_then_arrival() -> None:
    rig = make_rig(max_num_seqs=1)
    for number, priority in enumerate([5, 0, 0, -3]):
        rig.submit(make_task(4, max_tokens=1, start=100 * number, priority=priority))
    order = [shape(rig.step())[0][0] for _ in range(4)]
    assert order == [4, 2, 3, 1]


def test_who_is_due_sooner_overtakes_a_prompt_between_two_chunks() -> None:
    rig = make_rig(max_batch_tokens=8)
    rig.submit(make_task(20, max_tokens=1, slack_s=9.0))
    assert shape(rig.step()) == [(1, 0, 8)]
    rig.submit(make_task(6, max_tokens=1, start=100, slack_s=5.0))
    rig.submit(make_task(4, max_tokens=1, start=200, slack_s=12.0))
    assert shape(rig.step()) == [(2, 0, 6), (1, 8, 2)]
    assert shape(rig.step()) == [(1, 10, 6), (3, 0, 2)]  # nobody is due before it any more
    assert shape(rig.step()) == [(1, 16, 4), (3, 2, 2)]
    rig.drain()


def test_a_prompt_is_told_the_time_of_the_steps_in_which_it_was() -> None:
    rig = make_rig(max_batch_tokens=8)
    long = rig.submit(make_task(16, max_tokens=3, slack_s=9.0))

    def step(seconds: float) -> None:
        batch = rig.schedule()
        assert batch is not None
        rig.now += seconds
        rig.commit(batch)

    step(2.0)
    short = rig.submit(make_task(8, max_tokens=1, start=100))
    step(5.0)  # only of the one that overtakes it
    rig.now += 100.0  # nothing runs
    step(3.0)
    step(7.0)  # a decode
    assert (long.prefill_s, short.prefill_s) == (5.0, 5.0)
    ahead = rig.submit(make_task(16, max_tokens=1, start=200))
    first, second = rig.schedule(), rig.schedule()  # the second waits for the first
    assert first is not None
    assert second is not None
    for batch in (first, second):
        rig.now += 4.0
        rig.commit(batch)
    assert ahead.prefill_s == 8.0
    rig.drain()


def test_who_shares_the_prefix_of_a_running_prompt_does_not_compute_it_again() -> None:
    rig = make_rig(max_batch_tokens=8)
    rig.submit(make_task(24, max_tokens=1, slack_s=9.0))
    assert shape(rig.step()) == [(1, 0, 8)]
    rig.submit(make_task(17, max_tokens=1, name="shares"))
    assert shape(rig.step()) == [(1, 8, 8)]
    assert shape(rig.step()) == [(2, 16, 1), (1, 16, 4)]
    rig.drain()


def test_nobody_is_overtaken_by_those_that_come_when_it_is_due() -> None:
    """Short prompts come for ever, more of them than can be computed."""
    rig = make_rig(max_batch_tokens=8, num_blocks=64, max_num_seqs=4)
    long = rig.submit(make_task(40, max_tokens=1, slack_s=10.0, name="long"))
    for now in range(40):
        short = make_task(9, max_tokens=1, start=41 + now, slack_s=1.0, name=str(now))
        rig.submit(short, now=float(now))
        rig.step()
        if long.number in rig.endings:
            break
    assert 10 <= now < 18  # those that came until then, and its own five steps


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_is() -> None:
    rig = make_rig()
    rig.submit(make_task(12, max_tokens=1))
    rig.drain()
    again = rig.submit(make_task(12, max_tokens=5, name="again"))
    assert shape(rig.step()) == [(2, 8, 4)]
    assert again.cached_tokens == 8
    longer = rig.submit(make_task(13, max_tokens=1, name="longer"))
    assert shape(rig.step()) == [(2, 12, 1), (3, 12, 1)]
    assert longer.cached_tokens == 12
    rig.drain()


def test_another_salt_shares_nothing_and_the_cache_can_be_off() -> None:
    rig = make_rig()
    rig.submit(make_task(12, max_tokens=1))
    rig.drain()
    other = rig.submit(replace(make_task(12, max_tokens=1, name="other"), cache_salt="tenant"))
    assert shape(rig.step()) == [(2, 0, 12)]
    assert other.cached_tokens == 0
    rig = make_rig(prefix_caching=False)
    for number in range(2):
        rig.submit(make_task(12, max_tokens=1, name=str(number)))
        assert shape(rig.step())[0][1:] == (0, 12)
    assert dict(rig.pool.counts())[BlockState.FREE] == 16


def test_a_running_sequence_already_lends_its_prompt() -> None:
    rig = make_rig()
    first = rig.submit(make_task(9))
    rig.step()
    second = rig.submit(make_task(9, name="second"))
    rig.step()
    assert second.cached_tokens == 8
    assert first.blocks[:2] == second.blocks[:2]
    assert first.blocks[2] != second.blocks[2]
    rig.drain()
    assert rig.answers[1] == rig.answers[2]


def test_twins_that_compute_the_same_at_once_do_no_harm() -> None:
    rig = make_rig(max_batch_tokens=32)
    rig.submit(make_task(12))
    rig.submit(make_task(12, name="twin"))
    rig.drain()
    assert rig.answers[1] == rig.answers[2]
    assert dict(rig.pool.counts())[BlockState.CACHED] == 3


def test_growth_preempts_the_youngest_of_the_lowest_priority() -> None:
    rig = make_rig(num_blocks=8, max_batch_tokens=32)
    tasks = [make_task(4, 16, 100 * n, priority=n % 2) for n in range(4)]
    sequences = [rig.submit(task) for task in tasks]
    while not any(sequence.preemptions for sequence in sequences):
        assert rig.step() is not None
    assert sequences[3].preemptions == 1
    rig.drain()
    assert sequences[0].preemptions == 0, "the first one is nobody's victim"
    for sequence, task in zip(sequences, tasks, strict=True):
        assert rig.answers[sequence.number] == expected_answer(task.prompt, task.sampling)


def test_a_victim_waits_with_its_answer_so_far() -> None:
    rig = make_rig(num_blocks=6)
    rig.submit(make_task(8, 16))
    victim = rig.submit(make_task(4, 16, 100))
    while not victim.preemptions:
        rig.step()
    assert (victim.blocks, victim.computed) == ((), 0)
    assert rig.scheduler.load().waiting_tokens == len(victim.context) > 4
    rig.drain()


def test_published_sequences_are_never_preempted() -> None:
    rig = make_rig(num_blocks=7, max_batch_tokens=5, max_num_seqs=3)
    decode = rig.submit(make_task(7, 10))
    rig.step()
    rig.step()
    published = rig.submit(make_task(16, 2, 100, priority=9), hand_off=True)
    rig.step()
    assert (len(decode.context), len(decode.blocks)) == (9, 2), "it needs a block"
    rig.pool.allocate(rig.pool.available)  # which somebody else took
    rig.scheduler.schedule(0.0)
    assert decode.preemptions == 1
    assert (published.leased, published.preemptions) == (1, 0)


@pytest.mark.parametrize("prompts_first", [False, True])
def test_when_everybody_made_way_somebody_else_starts(prompts_first: bool) -> None:
    rig = make_rig(num_blocks=6, max_num_seqs=1, prompts_first=prompts_first)
    leased = rig.submit(make_task(12, 2, 100), hand_off=True)
    rig.drain()
    decode = rig.submit(make_task(9, 16, priority=5))
    rig.step()
    urgent = rig.submit(make_task(5, 2, 200))
    while not decode.preemptions:
        assert shape(rig.step())[0][0] in (decode.number, urgent.number)
    assert urgent.number in rig.endings or urgent.blocks
    rig.drain()
    assert rig.endings.keys() == {urgent.number}, "the other waits for the lease to end"
    rig.scheduler.remove(leased, Ending(FinishReason.HANDED_OFF))
    rig.drain()
    assert rig.endings[decode.number].reason is FinishReason.LENGTH


def test_blocks_of_answers_are_found_again_too() -> None:
    rig = make_rig(max_batch_tokens=32)
    rig.submit(make_task(6, 7))
    rig.drain()
    turn = make_task(6)
    prompt = (*turn.prompt, *rig.answers[1], 7, 7)
    second = rig.submit(replace(turn, prompt=prompt, attempt=AttemptId("next turn")))
    rig.drain()
    assert second.cached_tokens == 12  # of the 12 tokens whose KV the first one had computed


def test_an_answer_that_outgrows_the_pool_ends_with_an_error() -> None:
    rig = make_rig(num_blocks=3)
    rig.submit(make_task(4, 60))
    rig.drain()
    ending = rig.endings[1]
    assert ending.reason is FinishReason.ERROR
    assert ending.error is not None
    assert "3 blocks" in ending.error.message
    assert len(rig.answers[1]) == 9  # 4 + 8 tokens have their KV in the pool; one more was sampled


def test_the_context_length_ends_an_answer() -> None:
    rig = make_rig(max_model_len=10)
    rig.submit(make_task(6, 60))
    rig.drain()
    assert rig.endings[1].reason is FinishReason.LENGTH
    assert len(rig.answers[1]) == 4


def test_penalties_see_prompt_and_answer() -> None:
    rig = make_rig()
    task = make_task(5, 5)
    task = replace(task, sampling=replace(task.sampling, repetition_penalty=1.5))
    rig.submit(task)
    batch = rig.schedule()
    assert batch is not None
    assert batch.items[0].sample is not None
    assert batch.items[0].sample.prompt == task.prompt
    rig.commit(batch)
    rig.drain()
    assert rig.answers[1] == expected_answer(task.prompt, task.sampling)


# -- reservations ---------------------------------------------------------------------------


def test_reservations_wait_in_line_with_sequences() -> None:
    rig = make_rig(num_blocks=4)
    running = rig.submit(make_task(12, 4))
    rig.step()
    first = rig.reserve(3)
    behind = rig.submit(make_task(4, 1, 100))
    small = rig.reserve(1)
    assert (first.blocks, small.blocks) == ((), ())
    rig.step()
    assert not behind.blocks, "nobody overtakes the head of the line"
    rig.cancel(running)
    rig.schedule()
    assert len(first.blocks) == 3
    rig.scheduler.drop_reservation(first)
    rig.drain()
    assert len(small.blocks) == 1
    assert rig.endings[behind.number].reason is FinishReason.LENGTH


def test_reservations_count_as_places() -> None:
    rig = make_rig(max_num_seqs=2)
    one, two, three = rig.reserve(1), rig.reserve(1), rig.reserve(1)
    assert [len(r.blocks) for r in (one, two, three)] == [1, 1, 0]
    rig.scheduler.quarantine(one)
    rig.scheduler.grant_reservations()
    assert len(three.blocks) == 1
    assert dict(rig.pool.counts())[BlockState.QUARANTINED] == 1
    for reservation in (one, two, three):
        rig.scheduler.drop_reservation(reservation)
    rig.scheduler.check_integrity()


def test_a_reservation_that_takes_the_last_place_leaves_none_to_a_sequence() -> None:
    rig = make_rig(max_num_seqs=2, max_batch_tokens=2)
    rig.submit(make_task(1))
    reservation = rig.reserve(1)
    rig.submit(make_task(1, start=100))
    assert shape(rig.step()) == [(1, 0, 1)]  # with budget to spare, but no place
    assert reservation.blocks
    assert rig.scheduler.load().running == 2
    rig.scheduler.drop_reservation(reservation)
    rig.drain()


def test_a_full_line_refuses() -> None:
    rig = make_rig(num_blocks=1, max_waiting=2)
    rig.submit(make_task(4, 1))
    rig.submit(make_task(4, 1, 100))
    with pytest.raises(Overloaded, match="2 requests"):
        rig.submit(make_task(4, 1, 200))
    with pytest.raises(Overloaded):
        rig.reserve(1)
    rig.drain()


# -- books ----------------------------------------------------------------------------------


def test_two_steps_at_a_time() -> None:
    rig = make_rig()
    rig.submit(make_task(4))
    first, second = rig.scheduler.schedule(0.0), rig.scheduler.schedule(0.0)
    assert first is not None
    assert shape(second) == [(1, 4, 1)]
    with pytest.raises(InternalError, match="2 steps"):
        rig.scheduler.schedule(0.0)
    rig.commit(first)
    with pytest.raises(InternalError, match="not in flight"):
        rig.scheduler.withdraw(first)


def test_the_check_sees_holds_without_a_holder() -> None:
    rig = make_rig()
    rig.pool.allocate(1)
    with pytest.raises(InternalError, match="holders"):
        rig.scheduler.check_integrity()


def test_load_counts_what_is_left_to_compute() -> None:
    rig = make_rig(max_num_seqs=1, max_batch_tokens=4)
    rig.submit(make_task(10))
    rig.submit(make_task(7, start=100))
    rig.step()
    load = rig.scheduler.load()
    assert (load.running, load.waiting, load.waiting_tokens) == (1, 1, 6 + 7)
    assert load.blocks_in(BlockState.ACTIVE) == 3
    assert sum(count for _, count in load.blocks) == 16


def test_lines_know_their_members() -> None:
    line: Line[Sequence] = Line()
    one, two = (Sequence(n, make_task(3), (), 0.0) for n in (1, 2))
    line.add(two)
    line.add(one)
    assert [*line] == [one, two]
    line.remove(two)
    with pytest.raises(ValueError, match="not in the line"):
        line.remove(two)
    assert (len(line), line.first) == (1, one)
    assert WaitingLine().first is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch_tokens": 3},
        {"max_num_seqs": 0},
        {"max_model_len": 0},
        {"layer_groups": 0},
        {"max_prefill_tokens": 0},
    ],
)
def test_a_configuration_that_cannot_work_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        make_rig(**wrong)


def test_what_can_never_fit_is_refused() -> None:
    config = make_rig(num_blocks=4, max_model_len=18).config
    config.require_fit(make_task(16))
    for task in (
        make_task(0),
        make_task(18),
        make_task(17),
        replace(make_task(9), output=(1,) * 8),
    ):
        with pytest.raises(InvalidRequest) as raised:
            config.require_fit(task)
        assert raised.value.param == "prompt"
