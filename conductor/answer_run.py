"""One answer in the making: a state machine that workers' outputs go into and text comes out of.

    start -> tokens ... -> finish of the worker that ends the answer -> done
      ^                \\-> a stop string -> settling: cancelled, waiting for the last words -> done
      |                \\-> error or loss -> failed, or done when only the last word is missing
      +---- pausing <----------------------+

Tokens come from two workers over two links, so they are ordered by index here and repeats are
dropped. Another attempt goes on behind the tokens that were passed on; those that came too early
are made again. Nothing here waits or sends: dispatch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from baton.errors import BatonError, StaleAttempt, TakenOver, WorkerLost
from baton.rpc.errors import from_wire
from baton.tokenizer import Tokenizer
from baton.types.fleet import Role
from baton.types.request import AttemptId, AttemptOutput, Finish, FinishReason, SampledToken
from conductor.answer_text import AnswerText
from conductor.detokenize import make_detokenizer
from conductor.request import Answer, Request

# Between the numbers of attempts that different conductors begin at an answer: one that takes it
# over may not know of the last retries.
NUMBER_GAP = 64


@dataclass(frozen=True, slots=True)
class Delta:
    """What has become known of one answer.

    `tokens` may be ahead of `text` (held-back characters). `offsets[i]` is where token i begins in
    the answer, in characters. The last `hidden` tokens ended the answer and have no text.
    """

    index: int
    text: str
    tokens: tuple[SampledToken, ...] = ()
    offsets: tuple[int, ...] = ()
    hidden: int = 0
    finish_reason: str | None = None  # "stop" | "length"


class Phase(StrEnum):
    NEW = "new"  # until dispatch begins the first attempt
    RUNNING = "running"
    SETTLING = "settling"  # the client has everything; the workers were told to stop
    DONE = "done"
    FAILED = "failed"
    PAUSING = "pausing"  # until dispatch begins another attempt


class AnswerRun:
    """The current attempt at one answer, and what the client has seen of it."""

    def __init__(
        self, request: Request, answer: Answer, tokenizer: Tokenizer, eos_ids: tuple[int, ...]
    ) -> None:
        sampling = answer.sampling
        self.answer = answer
        self.attempt = AttemptId(f"{request.key}.{answer.index}")
        sent = request.sent_of(answer.index)
        self.phase = Phase.DONE if sent.ended else Phase.NEW
        self._client_has = sent.tokens
        self.error: BatonError | None = None  # of the last attempt that failed
        self.cached_tokens = 0
        self._cached_by: int | None = None  # the attempt that told
        self._ids: list[int] = []  # tokens that were passed on
        self._next_number = NUMBER_GAP if request.sent else 0  # of the next attempt
        self._resumable = bool(request.sent)  # and others may have begun attempts at it
        self._adopting = False
        self._resumed_at = 0  # tokens that were passed on before this attempt
        self._split = False
        self._stop_ids = frozenset(sampling.stop_token_ids) | frozenset(
            () if sampling.ignore_eos else eos_ids
        )
        detokenizer = make_detokenizer(tokenizer, answer.prompt, request.skip_special_tokens)
        self._text = AnswerText(detokenizer, request.stop, sampling.min_tokens)
        self._early: dict[int, SampledToken] = {}
        self._ending: FinishReason | None = None
        self._prefill_done = False
        self._decoding = False
        self._awaiting: str | None = None
        self._prefill_lost: str | None = None

    @property
    def num_tokens(self) -> int:
        """That were passed on."""
        return len(self._ids)

    @property
    def completion_tokens(self) -> int:
        """Of the whole answer, what the client had before included."""
        return max(self.num_tokens, self._client_has)

    @property
    def output(self) -> tuple[int, ...]:
        """The ids of the tokens that were passed on."""
        return tuple(self._ids)

    @property
    def context(self) -> tuple[int, ...]:
        """What the next attempt begins with: the prompt, and the tokens that were passed on."""
        return (*self.answer.prompt, *self._ids) if self._ids else self.answer.prompt

    @property
    def progressed(self) -> bool:
        """Whether this attempt has brought tokens."""
        return self.num_tokens > self._resumed_at

    @property
    def is_complete(self) -> bool:
        """Whether every token has come, so that at most the worker's last word is missing."""
        return self._known_ending() is not None

    @property
    def handed_off(self) -> bool:
        """Whether the decode worker has this attempt's KV, as far as the prefill worker said."""
        return self._prefill_done

    def begin(self, split: bool) -> None:
        """A (new) attempt starts; `split` when a prefill worker takes part."""
        self._begin(self._next_number, split)

    def follow(self, older: AnswerRun) -> None:
        """`older` made this answer for an earlier connection to this conductor: the attempts that
        it began may be on their way to workers still, and their numbers are not used again."""
        self._next_number = max(self._next_number, older._next_number)

    def adopt(self, attempt: AttemptId) -> None:
        """Take over an attempt that another conductor began, or one before the client came back.
        The worker answers with all its tokens."""
        following = max(self._next_number, attempt.number + NUMBER_GAP)
        self._begin(attempt.number, split=False)
        self._next_number = following
        self._adopting = True
        self._awaiting = f"attempt {attempt} was not handed over in time"

    def _begin(self, number: int, split: bool) -> None:
        self.attempt = AttemptId(self.attempt.request_id, number)
        self._next_number = number + 1
        self.phase = Phase.RUNNING
        self._resumed_at = self.num_tokens
        if not self._ids:
            self._cached_by = None
            self.cached_tokens = 0
        self._split = split
        self._early.clear()
        self._ending = None
        self._prefill_done = False
        self._decoding = False
        self._awaiting = None
        self._prefill_lost = None
        self._adopting = False

    @property
    def awaiting_peer(self) -> bool:
        """One worker has said its last word, and only the other one can end the answer."""
        return self.phase is Phase.RUNNING and self._awaiting is not None

    def fail_awaiting(self) -> Delta | None:
        """The other worker has not ended the answer in time."""
        self.fail(WorkerLost(self._awaiting or "a worker stopped answering"))
        return self._make_delta(())

    def on_output(self, duty: Role, output: AttemptOutput) -> Delta | None:
        """Take what a worker says about the current attempt."""
        if output.finish is not None:
            self._note_cached(output.finish.cached_tokens)
        if self.phase is Phase.SETTLING:
            if output.finish is not None and self._knows_usage(duty):
                self.phase = Phase.DONE
            return None
        if self.phase is not Phase.RUNNING:
            return None
        if self._adopting and not self._is_adopted(output):
            return None
        if duty is Role.DECODE and output.tokens:
            self._awaiting = None
            self._decoding = True
        ready = self._in_order(output.tokens)
        if self._early and self._prefill_lost is not None:
            self.fail(WorkerLost(self._prefill_lost))  # and the first token with it
        elif output.finish is not None:
            self._on_finish(duty, output.finish)
        return self._make_delta(ready)

    def on_lost(self, duty: Role, worker: str, reason: str) -> Delta | None:
        """The link to a worker broke."""
        if self.phase is Phase.SETTLING:
            self.phase = Phase.DONE
        if self.phase is not Phase.RUNNING:
            return None
        lost = f"worker {worker} was lost while it held the request: {reason}"
        if duty is Role.DECODE or self._early or not self.progressed:
            self.fail(WorkerLost(lost))  # nobody else has the first token of this attempt
        elif not self._prefill_done and not self._decoding:
            # The KV may have been handed over: the decode worker knows.
            self._awaiting = self._prefill_lost = lost
        return self._make_delta(())

    def _is_adopted(self, output: AttemptOutput) -> bool:
        """Whether this is the worker's answer, with every token from index 0; or else this fails,
        unless the worker said it before it heard of us."""
        tokens, finish = output.tokens, output.finish
        if tokens and tokens[0].index == 0:
            wanted = self.answer.sampling.logprobs is not None
            if not wanted or all(t.logprob for t in tokens[self._client_has :]):
                self._adopting = False
                return True
        elif tokens and finish is None:
            return False
        why = finish.error.message if finish and finish.error else "not all its tokens are known"
        self.fail(WorkerLost(f"{self.attempt} cannot be taken over: {why}"))
        return False

    def _note_cached(self, tokens: int) -> None:
        """From the workers of one attempt: later ones may find what this request has computed."""
        if self._cached_by in (None, self.attempt.number):
            self._cached_by = self.attempt.number
            self.cached_tokens = max(self.cached_tokens, tokens)

    def _knows_usage(self, duty: Role) -> bool:
        """Whether this worker's last word says how many prompt tokens were cached: a decode worker
        that has not taken over yet does not know."""
        took_over = not self._split or self._decoding or self._prefill_done
        return duty is (Role.DECODE if took_over else Role.PREFILL)

    def _in_order(self, tokens: tuple[SampledToken, ...]) -> Sequence[SampledToken]:
        if not self._early and len(tokens) == 1 and tokens[0].index == self.num_tokens:
            return tokens  # as nearly always
        ready: list[SampledToken] = []
        for token in tokens:
            if token.index >= self.num_tokens + len(ready):
                self._early[token.index] = token
            while (following := self._early.pop(self.num_tokens + len(ready), None)) is not None:
                ready.append(following)
        return ready

    def _on_finish(self, duty: Role, finish: Finish) -> None:
        if finish.reason is FinishReason.ERROR:
            error = finish.error
            if error and error.code == StaleAttempt.code:
                self.fail(self._on_stale(error.message))
                return
            self.fail(from_wire(error) if error else WorkerLost("a worker failed without a word"))
        elif finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._ending = finish.reason
            if self._early:
                self._awaiting = "the first token of the answer was lost with its worker"
        elif finish.reason is FinishReason.HANDED_OFF and duty is Role.PREFILL:
            self._prefill_done = True
        elif duty is Role.DECODE and self._split and not self._prefill_done:
            # The first token may have ended the answer: then the prefill worker says so.
            self._awaiting = self._awaiting or "the decode worker gave the request up"
        else:
            self.fail(WorkerLost(f"the {duty} worker gave the request up ({finish.reason})"))

    def _on_stale(self, message: str) -> BatonError:
        """Somebody has begun attempts with higher numbers, and this answer is ours only if it has
        just come back to us; an older owner does not take it back."""
        if not self._resumable or self._resumed_at:
            return TakenOver(message)
        self._next_number += NUMBER_GAP
        return WorkerLost(message)

    def _replay(self, ready: Sequence[SampledToken]) -> Sequence[SampledToken]:
        """Bring the text to where the client's is; return the tokens behind that."""
        for place, token in enumerate(ready):
            if self.num_tokens >= self._client_has:
                return ready[place:]
            self._ids.append(token.token_id)
            if token.token_id not in self._stop_ids:
                self._text.push(token.token_id)
        return ()

    def _make_delta(self, ready: Sequence[SampledToken]) -> Delta | None:
        if self.num_tokens < self._client_has:
            ready = self._replay(ready)
        text: list[str] = []
        offsets: list[int] = []
        shown = 0
        hidden = 0
        for token in ready:
            shown += 1
            self._ids.append(token.token_id)
            offsets.append(self._text.length)
            if token.token_id in self._stop_ids:
                hidden = 1
                break
            text.append(self._text.push(token.token_id))
            if self._text.stopped:
                break
        finish_reason = self._end_of_answer(text)
        if not shown and finish_reason is None:
            return None
        tokens = tuple(ready[:shown])
        index = self.answer.index
        return Delta(index, "".join(text), tokens, tuple(offsets), hidden, finish_reason)

    def _end_of_answer(self, text: list[str]) -> str | None:
        if self._text.stopped:
            ended = self._ending or self.phase is Phase.FAILED
            self.phase = Phase.DONE if ended else Phase.SETTLING
            return "stop"
        if self.phase is Phase.FAILED:
            self._ending = self._known_ending()
        elif self._early:
            return None
        if self._ending is None:
            return None
        text.append(self._text.flush())
        self.phase = Phase.DONE
        return "stop" if self._text.stopped else self._ending.value

    def _known_ending(self) -> FinishReason | None:
        """How the answer has ended, when nothing but the worker's word for it is missing."""
        if self._ids and self._ids[-1] in self._stop_ids:
            return FinishReason.STOP
        full = self.num_tokens >= self.answer.sampling.max_tokens
        return FinishReason.LENGTH if full else None

    def fail(self, error: BatonError) -> None:
        """The attempt has ended with `error`."""
        self.phase = Phase.FAILED
        self.error = error
