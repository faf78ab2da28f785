"""Two conductors have the same answer: who came last keeps it."""

from __future__ import annotations

from baton.errors import StaleAttempt, TakenOver, WorkerLost
from baton.types.fleet import Role
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    SampledToken,
    SamplingParams,
    WireError,
)
from baton.types.trace import TraceContext
from conductor.answer_run import NUMBER_GAP, AnswerRun
from conductor.request import Answer, Request, Sent, Tracing
from tests.fake_worker import EOS, tiny_model


def new_run(sent: int) -> AnswerRun:
    prompt, sampling = (1, 2), SamplingParams(max_tokens=8)
    request = Request(
        id="r",
        key="r",
        model="tiny",
        answers=(Answer(0, 0, prompt, sampling),),
        stop=(),
        skip_special_tokens=True,
        priority=0,
        cache_salt="",
        cache_pin_s=None,
        received=0.0,
        deadline=60.0,
        sent=(Sent(sent),),
        operation="text_completion",
        tracing=Tracing(TraceContext("7" * 32, "8" * 16, sampled=False), None, 0.0, 0.0),
    )
    return AnswerRun(request, request.answers[0], tiny_model().tokenizer, (EOS,))


def resumed_run(sent: int) -> AnswerRun:
    run = new_run(sent)
    run.begin(split=True)
    return run


def stale(run: AnswerRun) -> AttemptOutput:
    error = WireError(StaleAttempt.code, "it has ended here")
    return AttemptOutput(run.attempt, finish=Finish(FinishReason.ERROR, error))


def test_who_has_just_come_back_outnumbers_attempts_that_nobody_told_of() -> None:
    """Found by the fault harness: also when the first token has come before the refusal."""
    run = resumed_run(sent=3)
    first = run.attempt.number
    run.on_output(Role.PREFILL, AttemptOutput(run.attempt, (SampledToken(97, 0),)))
    run.on_output(Role.DECODE, stale(run))
    assert isinstance(run.error, WorkerLost)
    run.begin(split=True)
    assert run.attempt.number > first + NUMBER_GAP


def test_numbers_of_an_earlier_connection_are_not_used_again() -> None:
    older, newer = resumed_run(sent=3), new_run(sent=3)
    newer.follow(older)
    newer.adopt(AttemptId(older.attempt.request_id, 0))
    newer.fail(WorkerLost("it was replaced"))
    newer.begin(split=True)
    assert newer.attempt.number > older.attempt.number


def test_who_has_had_it_for_a_while_leaves_it_to_the_newer_one() -> None:
    run = resumed_run(sent=0)
    run.on_output(Role.DECODE, AttemptOutput(run.attempt, (SampledToken(97, 0),)))
    run.fail(WorkerLost("killed"))
    run.begin(split=False)
    run.on_output(Role.DECODE, stale(run))
    assert isinstance(run.error, TakenOver)
