"""A client's request inside the conductor: first as it was asked, then as it will be served.

HTTP and gRPC each build an `Ask` (types checked, ranges not); `conductor.validate` turns it into a
`Request`, which is what admission, routing and dispatch work on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from baton.types.request import AttemptId, SamplingParams
from baton.types.trace import TraceContext, span_id_of, trace_id_of
from conductor.tenants.tenant import ANYBODY, Tenant


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, to be rendered by the model's template."""

    messages: tuple[Mapping[str, Any], ...]


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True, slots=True)
class Options:
    """Sampling options as the client gave them; None means that the client said nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """`default_max_tokens` is None where an answer may fill the rest of the context.

    `names` maps an option to what this API calls it, for the `param` of error messages.
    """

    model: str
    prompts: tuple[Prompt, ...]
    options: Options
    request_id: str | None = None
    priority: int = 0
    cache_salt: str = ""
    cache_pin_s: float | None = None
    default_max_tokens: int | None = None
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers that a request asks for: (number of prompts) x `n` in all."""

    index: int
    prompt_index: int
    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Sent:
    """What a client already has of an answer."""

    tokens: int = 0
    ended: bool = False  # and it knows that there is no more

    def __str__(self) -> str:
        return f"{self.tokens}e" if self.ended else str(self.tokens)


@dataclass(frozen=True, slots=True)
class Arrival:
    """How a request came: when its last byte was there (loop time), under which span of the
    client's, if it says so, and from whom."""

    at: float
    caller: TraceContext | None = None
    tenant: Tenant = ANYBODY


@dataclass(frozen=True, slots=True)
class Tracing:
    """Of one request. `context` is its own span, whose parent is the client's `caller`. Between its
    arrival and `read_at` it was parsed, and until `tokenized_at` its prompts became token ids."""

    context: TraceContext
    caller: TraceContext | None
    read_at: float
    tokenized_at: float

    def of_attempt(self, attempt: AttemptId) -> TraceContext:
        """What travels to an attempt's workers."""
        return self.context.child(str(attempt))

    @property
    def exemplar(self) -> str | None:
        """The id of the trace, if somebody keeps it: then metrics may point to it."""
        return self.context.trace_id if self.context.sampled else None


def begin_trace(
    key: str, caller: TraceContext | None, sample: float, again: str = ""
) -> TraceContext:
    """The span of the request with that key: in the client's trace, which decides whether it is
    sampled, or in one of its own, which is with probability `sample`, and which it goes on in when
    its client comes back for the rest; that time's own name is `again`."""
    span_id = span_id_of(key + again)
    if caller is not None:
        return TraceContext(caller.trace_id, span_id, caller.sampled, caller.state)
    trace_id = trace_id_of(key)
    return TraceContext(trace_id, span_id, int(trace_id[:8], 16) < sample * 2**32)


@dataclass(frozen=True, slots=True)
class Request:
    """A request that can be served. `deadline` is in the event loop's time, seconds.

    `id` is what the client sees. `key` begins the attempts' ids and is never used twice, even when
    a client sends the same `request_id` again; only when it comes back for the rest of an answer.
    Then there is an entry in `sent` for each answer.
    """

    id: str
    key: str
    model: str
    answers: tuple[Answer, ...]
    stop: tuple[str, ...]
    skip_special_tokens: bool
    priority: int
    cache_salt: str
    cache_pin_s: float | None
    received: float
    deadline: float
    operation: str  # "chat" or "text_completion", as OpenTelemetry calls them
    tracing: Tracing
    tenant: Tenant = ANYBODY
    sent: tuple[Sent, ...] = ()

    def sent_of(self, index: int) -> Sent:
        """What the client already has of the answer."""
        return self.sent[index] if self.sent else Sent()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; a prompt with several answers counts once."""
        return sum(
            len(prompt) for prompt in {a.prompt_index: a.prompt for a in self.answers}.values()
        )
