"""Where a request's time to the first token went: named stages that do not overlap.

    received  read_at  tokenized  sent                            heard    passed on
    |-- read --|- tokenize -|- route -|- dispatch ... return -----|- deliver -|
    in the worker, by its own clock:    |queue|prefix_load|batch_wait|prefill|

The stages, and what none of them covers, add up to the whole exactly. A worker tells its own times
by its own clock. That is moved, as little as possible, to where they can have been: between the
message that started the attempt and the one that brought the token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from baton.types.request import Span

READ = "read"  # parse the body
TOKENIZE = "tokenize"
ROUTE = "route"  # admission, hashing the prompt, choosing workers, waiting for one
ADOPT = "adopt"  # a worker that decodes it already was found, and answered
RETRIES = "retries"  # attempts that brought nothing, and pauses between them
DISPATCH = "dispatch"  # the start, on its way to the worker that computes the prompt
QUEUE = "queue"
PREFIX_LOAD = "prefix_load"  # KV that others have, as far as nothing was computed meanwhile
BATCH_WAIT = "batch_wait"  # steps before and between its own, which compute for others
PREFILL = "prefill"  # the steps that compute the prompt, whoever else is in them
RETURN = "return"  # the token, on its way from the worker
DELIVER = "deliver"  # text made of it, and handed to the client's connection
EXPOSED_TRANSFER = "exposed_transfer"  # the rest of the KV, which the second token waits for
FIRST_STEP = "first_step"  # of decoding, which makes the second token

_OF_WORKER = {"queue": QUEUE, "fetch": PREFIX_LOAD, "prefill": PREFILL}
_BEHIND_FIRST = {"handoff": EXPOSED_TRANSFER, "first_step": FIRST_STEP}


@dataclass(frozen=True, slots=True)
class Stage:
    """Unix seconds, by the conductor's clock."""

    name: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What is known of the way to it, in Unix seconds of the conductor's clock; None: not yet.
    `spans` are of the worker that computed the prompt, in the attempt that brought the token."""

    received_s: float
    read_s: float
    tokenized_s: float
    first_sent_s: float | None  # when the first attempt was handed to its workers
    sent_s: float | None  # and the one that brought the token, or runs now
    adopted: bool
    heard_s: float | None
    passed_s: float | None
    spans: Sequence[Span] = ()


def ttft_stages(known: FirstToken, now_s: float) -> tuple[Stage, ...]:
    """In order, within the time from receipt until the token was passed on, or until now."""
    end_s = known.passed_s if known.passed_s is not None else now_s
    return tuple(_cut(_claims(known), known.received_s, end_s))


def behind_first(spans: Mapping[str, Span], window: tuple[float, float]) -> tuple[Stage, ...]:
    """What the second token waited for, by the spans of the workers: not a part of TTFT, because
    the first token does not wait for the transfer. In the window [first token, end]."""
    claims = [
        Stage(name, spans[span].start_s, spans[span].end_s)
        for span, name in _BEHIND_FIRST.items()
        if span in spans
    ]
    return tuple(_cut(claims, *window))


def _claims(known: FirstToken) -> Iterator[Stage]:
    """Which may overlap where clocks are odd: the earlier one in this order has it."""
    yield Stage(READ, known.received_s, known.read_s)
    yield Stage(TOKENIZE, known.read_s, known.tokenized_s)
    if known.first_sent_s is None or known.sent_s is None:
        return
    if known.adopted:
        if known.heard_s is not None:
            yield Stage(ADOPT, known.tokenized_s, known.heard_s)
    else:
        yield Stage(ROUTE, known.tokenized_s, known.first_sent_s)
        if known.sent_s > known.first_sent_s:
            yield Stage(RETRIES, known.first_sent_s, known.sent_s)
        yield from _of_worker(known)
    if known.heard_s is not None and known.passed_s is not None:
        yield Stage(DELIVER, known.heard_s, known.passed_s)


def _of_worker(known: FirstToken) -> Iterator[Stage]:
    """From the start of the attempt until its token was heard."""
    if known.sent_s is None or known.heard_s is None:
        return
    own = [span for span in known.spans if span.name in _OF_WORKER]
    own = align(own, known.sent_s, known.heard_s)
    if not own:
        return
    yield Stage(DISPATCH, known.sent_s, own[0].start_s)
    for span, following in zip(own, [*own[1:], None], strict=True):
        end_s = span.end_s if following is None else min(span.end_s, following.start_s)
        if span.compute_s and span.name == "prefill":
            begun_s = max(span.start_s, end_s - span.compute_s)
            yield Stage(BATCH_WAIT, span.start_s, begun_s)
            yield Stage(PREFILL, begun_s, end_s)
        else:
            yield Stage(_OF_WORKER[span.name], span.start_s, end_s)
    yield Stage(RETURN, own[-1].end_s, known.heard_s)


def clock_shift(spans: Sequence[Span], earliest_s: float, latest_s: float) -> float:
    """The least, in seconds, that brings spans of another clock between the two times; where they
    take longer than that, behind the earlier one."""
    if not spans:
        return 0.0
    start_s, end_s = min(s.start_s for s in spans), max(s.end_s for s in spans)
    return max(earliest_s - start_s, min(latest_s - end_s, 0.0))


def align(spans: Sequence[Span], earliest_s: float, latest_s: float) -> list[Span]:
    """The spans of another clock, all moved by its shift; what still does not fit (a clock that
    runs faster) is cut off at the end."""
    shift_s = clock_shift(spans, earliest_s, latest_s)
    return [
        replace(
            span,
            start_s=min(span.start_s + shift_s, latest_s),
            end_s=min(span.end_s + shift_s, latest_s),
        )
        for span in spans
    ]


def _cut(claims: Iterable[Stage], start_s: float, end_s: float) -> Iterator[Stage]:
    """The claims without what lies outside of [start, end], or before the end of the last one."""
    reached_s = start_s
    for claim in claims:
        begin_s, stop_s = max(claim.start_s, reached_s), min(claim.end_s, end_s)
        if stop_s >= begin_s:
            yield Stage(claim.name, begin_s, stop_s)
            reached_s = stop_s
