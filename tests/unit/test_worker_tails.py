"""Answers so far, and what is kept of those that have ended."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    GenerationTask,
    SampledToken,
    SamplingParams,
    TokenLogprob,
)
from baton.worker.tails import ENTRY_BYTES, EndedTails, Tail
from tests.virtual_time import virtual_time

DONE = Finish(FinishReason.STOP)
A, B, C = (AttemptId(name) for name in "abc")
real = st.floats(allow_nan=False)
u32 = st.integers(0, 2**32 - 1)
tops = st.lists(st.tuples(u32, real), max_size=4).map(tuple)


def tail(*output: int, logprobs: int | None = None) -> Tail:
    return Tail(GenerationTask(A, (1, 2), SamplingParams(logprobs=logprobs), output))


@given(
    st.lists(u32, max_size=5).map(tuple),
    st.lists(st.tuples(u32, st.none() | st.builds(TokenLogprob, real, tops)), max_size=12),
    st.integers(1, 4),
)
def test_a_tail_gives_back_what_it_was_given(
    output: tuple[int, ...],
    produced: list[tuple[int, TokenLogprob | None]],
    step: int,
) -> None:
    t = tail(*output, logprobs=4)
    given = tuple(SampledToken(token_id, index) for index, token_id in enumerate(output))
    new = tuple(
        SampledToken(token_id, len(output) + index, logprob)
        for index, (token_id, logprob) in enumerate(produced)
    )
    assert not t.decodes
    for begin in range(0, len(new), step):
        t.add(new[begin : begin + step])
    assert t.tokens() == given + new
    assert t.decodes == bool(new)


def test_log_probabilities_cost_only_who_asked_for_them() -> None:
    plain, rich = tail(), tail(logprobs=2)
    token = (SampledToken(7, 0, TokenLogprob(-0.5, ((7, -0.5), (9, -1.5)))),)
    for each in (plain, rich):
        each.add(token)
    assert plain.tokens() == (SampledToken(7, 0),)
    assert rich.tokens() == token
    assert plain.nbytes == 4 < rich.nbytes


@virtual_time
async def test_an_ended_answer_is_kept_for_a_while() -> None:
    ended, t = EndedTails(linger_s=10.0), tail(5)
    t.add((SampledToken(6, 1),))
    ended.keep(A, t, DONE)
    await asyncio.sleep(6.0)
    ended.keep(B, tail(), DONE)
    everything = AttemptOutput(A, (SampledToken(5, 0), SampledToken(6, 1)), DONE)
    assert ended.find(A) == ended.find(A) == everything
    assert ended.find(C) is None
    await asyncio.sleep(4.0)
    assert ended.find(A) is None
    assert ended.find(B) == AttemptOutput(B, (), DONE)
    await asyncio.sleep(6.0)
    assert ended.find(B) is None


@virtual_time
async def test_the_oldest_ended_answers_make_room() -> None:
    ended = EndedTails(linger_s=10.0, max_bytes=2 * (ENTRY_BYTES + 8))
    for attempt in (A, B, A, C):  # the second of A takes the place of the first
        ended.keep(attempt, tail(1, 2), DONE)
    assert ended.find(B) is None
    assert ended.find(A) is not None
    assert ended.find(C) is not None
    ended.keep(B, tail(*range(1000)), DONE)  # more than there is room for
    assert [ended.find(attempt) for attempt in (A, B, C)] == [None, None, None]
    ended.keep(A, tail(1), DONE)
    assert ended.find(A) is not None
