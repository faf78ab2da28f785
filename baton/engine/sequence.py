"""One attempt's progress through an engine, from its prompt to its last token."""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.engine.batch import SampleRequest
from baton.errors import BatonError, InternalError
from baton.types.request import (
    FinishReason,
    GenerationTask,
    SampledToken,
    Span,
    WireError,
)


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sequence leaves the engine. `error` is set exactly when the reason is ERROR."""

    reason: FinishReason
    error: WireError | None = None


def error_ending(error: Exception, innocent: bool = False) -> Ending:
    """`innocent`: the sequence may not be to blame, so that it may be tried again elsewhere."""
    if isinstance(error, BatonError):
        wire = WireError(error.code, error.message, error.retryable or innocent)
    else:
        text = f"{type(error).__name__}: {error}"
        wire = WireError(InternalError.code, text, retryable=innocent)
    return Ending(FinishReason.ERROR, wire)


class Sequence:
    """Mutable; changed only by the scheduler (and the publisher, for `leased`).

    Always true:
    - `context` is prompt + answer so far; its KV is computed for [0, computed), and
      computed < len(context): the last token's KV is never there yet, its logits are wanted.
    - `steps` steps in flight use the sequence. When they have ended, KV is computed for
      [0, planned), and `coming` tokens more are in the context:

          |<------ context ------>|<- coming ->|
          |<- computed ->|<-- steps -->|          planned < len(context) + coming
                                       ^ planned

      A part of it may be other sequences' work, where a prefix is shared while it is computed.
    - `blocks` is empty while the sequence waits and covers at least `planned` tokens.
    - blocks[:leased] are published to a handoff; without `hand_off`, leased is 0.
    """

    __slots__ = (
        "arrived_at",
        "blocks",
        "brought",
        "cached_tokens",
        "coming",
        "computed",
        "context",
        "early_at",
        "ending",
        "fetchable",
        "first_token_at",
        "found_tokens",
        "hand_off",
        "keys",
        "leased",
        "limit",
        "number",
        "order",
        "penalized",
        "planned",
        "preemptions",
        "prefill_s",
        "second_token_at",
        "started_at",
        "steps",
        "stop_ids",
        "submitted_at",
        "task",
    )

    def __init__(
        self,
        number: int,
        task: GenerationTask,
        eos_token_ids: tuple[int, ...],
        now: float,
        hand_off: bool = False,
        fetchable: int = 0,
    ) -> None:
        params = task.sampling
        self.number = number  # engine-wide; also the order of arrival
        self.task = task
        self.hand_off = hand_off
        self.fetchable = fetchable  # leading blocks whose KV others may have
        self.order = (task.priority, now + task.slack_s, number)
        self.context = [*task.prompt, *task.output]
        self.blocks: tuple[int, ...] = ()
        self.computed = 0
        self.planned = 0
        self.coming = 0
        self.steps = 0
        self.leased = 0
        # Context length at which it leaves, unless a stop token comes first.
        self.limit = len(self.context) + 1 if hand_off else len(task.prompt) + params.max_tokens
        self.keys: list[bytes] = []  # of the leading full blocks, as far as anybody asked
        self.cached_tokens = 0
        self.found_tokens = 0  # of the prompt, that this pool had when its turn came
        self.preemptions = 0
        self.prefill_s = 0.0  # of the steps that computed its prompt, whoever else was in them
        self.ending: Ending | None = None  # decided while a step used it; the commit acts
        self.stop_ids = (() if params.ignore_eos else eos_token_ids) + params.stop_token_ids
        self.penalized = (
            params.presence_penalty != 0
            or params.frequency_penalty != 0
            or params.repetition_penalty != 1
        )
        self.submitted_at = now
        self.started_at: float | None = None
        self.arrived_at: float | None = None  # of KV that was fetched for it
        self.early_at: float | None = None  # when its first step began, if that was before
        self.first_token_at: float | None = None
        self.second_token_at: float | None = None
        self.brought: tuple[Span, ...] = ()  # how its KV came from a prefill worker; loop time

    @property
    def remaining(self) -> int:
        """Context tokens whose KV is still to be computed. 1 for a decode."""
        return len(self.context) - self.computed

    @property
    def unplanned(self) -> int:
        """Context tokens that no step in flight computes either. 1 for a decode; the token is not
        known while `coming` is not 0."""
        return len(self.context) + self.coming - self.planned

    @property
    def spent(self) -> bool:
        """Whether the steps in flight are its last, whatever they sample."""
        return len(self.context) + self.coming >= self.limit or self.ending is not None

    @property
    def may_end(self) -> bool:
        """Whether the last token can have been the last one: spares others a closer look."""
        return self.context[-1] in self.stop_ids or len(self.context) >= self.limit

    @property
    def num_output(self) -> int:
        """Answer tokens so far; also the output index of the next token."""
        return len(self.context) - len(self.task.prompt)

    def sample_request(self) -> SampleRequest:
        """For the first token that no step in flight samples."""
        task, index = self.task, self.num_output + self.coming
        if not self.penalized:
            return SampleRequest(task.sampling, index, self.stop_ids)
        output = tuple(self.context[len(task.prompt) :])
        return SampleRequest(task.sampling, index, self.stop_ids, task.prompt, output)

    def append(self, token: SampledToken, now: float) -> None:
        self.context.append(token.token_id)
        if self.second_token_at is None:
            if self.first_token_at is None:
                self.first_token_at = now
            else:
                self.second_token_at = now

    def natural_end(self, max_model_len: int) -> FinishReason | None:
        """STOP or LENGTH when the answer so far is complete. (The sampler keeps stop tokens out
        while there are fewer than `min_tokens`.)

        The end-of-sequence or stop token is part of the answer's tokens; whoever makes text of
        them leaves it out.
        """
        output = self.num_output
        if output and self.context[-1] in self.stop_ids:
            return FinishReason.STOP
        if output >= self.task.sampling.max_tokens or len(self.context) >= max_model_len:
            return FinishReason.LENGTH
        return None

    def spans(self, now: float, unix_offset: float) -> tuple[Span, ...]:
        """Where the time went until `now`; `unix_offset` turns loop time into unix seconds. One
        begins where the one before it ends; a prefill that did not wait for all KV begins earlier,
        and the first step of decoding is a part of it.
        """
        told = self.brought if self.brought else self._until_first_token(now)
        if self.first_token_at is not None:
            if self.hand_off:
                told += (Span("handoff", self.first_token_at, now),)
            else:
                told += (Span("decode", self.first_token_at, now, (("tokens", self.num_output),)),)
            if self.second_token_at is not None:
                told += (Span("first_step", self.first_token_at, self.second_token_at),)
        return tuple(
            replace(span, start_s=span.start_s + unix_offset, end_s=span.end_s + unix_offset)
            for span in told
        )

    def _until_first_token(self, now: float) -> tuple[Span, ...]:
        marks = [("queue", self.submitted_at)]
        if self.started_at is not None:
            marks.append(("prefill", self.started_at))
            if self.arrived_at is not None:
                marks[-1:] = [("fetch", self.started_at), ("prefill", self.arrived_at)]
        until = self.first_token_at if self.first_token_at is not None else now
        ends = [start for _, start in marks[1:]] + [until]
        if self.early_at is not None:
            marks = [(n, self.early_at if n == "prefill" else start) for n, start in marks]
        given = len(self.task.prompt) + len(self.task.output)
        done = (
            ("tokens", given - self.cached_tokens),
            ("cached_tokens", self.cached_tokens),
            ("compute_us", round(self.prefill_s * 1e6)),
        )
        return tuple(
            Span(name, start, end, done if name == "prefill" else ())
            for (name, start), end in zip(marks, ends, strict=True)
        )
