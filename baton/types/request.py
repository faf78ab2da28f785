"""What a request asks for and what comes back: sampling parameters, tasks, tokens, endings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from baton.types.trace import TraceContext

MAX_PIN_S = 86_400.0  # a day


class FinishReason(StrEnum):
    """Why a worker is done with an attempt. Exactly one per attempt and worker."""

    STOP = "stop"  # an end-of-sequence or stop token was sampled
    LENGTH = "length"  # max_tokens or the context length was reached
    CANCELLED = "cancelled"
    ERROR = "error"
    HANDED_OFF = "handed_off"  # prefill worker only: the decode worker holds the KV now


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Stop *strings* live in the conductor, which owns the text.

    Every value is already validated; `seed` is always set (the conductor draws one when the client
    gave none) because the generator is keyed by (seed, output index).
    """

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # unsigned 64 bit
    max_tokens: int = 16
    min_tokens: int = 0  # end-of-sequence and stop tokens are masked before this many tokens
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # None = none; k = the chosen token's and the k best


@dataclass(frozen=True, slots=True)
class AttemptId:
    """One try at one request. A higher number for the same request makes a lower one stale."""

    request_id: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.request_id}#{self.number}"


@dataclass(frozen=True, slots=True)
class GenerationTask:
    """What a worker needs to know to work on an attempt.

    `output` holds answer tokens that the client already has (a resumed request): they are part of
    the context, and the next token sampled has output index `len(output)`.
    """

    attempt: AttemptId
    prompt: tuple[int, ...]
    sampling: SamplingParams
    output: tuple[int, ...] = ()
    priority: int = 0  # lower runs first, as in vLLM
    timeout_s: float | None = None  # what is left of the request's deadline when this was sent
    cache_salt: str = ""
    cache_pin_s: float | None = None  # keep the prompt's KV in the store that long; up to MAX_PIN_S
    slack_s: float = 0.0  # later than it came its prompt is due: who is due sooner goes first
    trace: TraceContext | None = None  # of the attempt: what is done for it belongs there


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities under the raw model distribution (before sampling parameters)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    index: int  # position in the answer, from 0; receivers use it to order and drop repeats
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """One named stretch of an attempt's life in a worker, for traces. Unix seconds. `counts` says
    how much was done in it: ("blocks", 12), ("bytes", 786432)."""

    name: str
    start_s: float
    end_s: float
    counts: tuple[tuple[str, int], ...] = ()

    @property
    def compute_s(self) -> float:
        """Of a prefill: the time of the steps that computed the prompt; 0 = not told."""
        return dict(self.counts).get("compute_us", 0) / 1e6


@dataclass(frozen=True, slots=True)
class WireError:
    """An error as it travels between processes."""

    code: str
    message: str
    retryable: bool = False
    client_fault: bool = False  # the request itself is wrong (InvalidRequest), whatever the code


@dataclass(frozen=True, slots=True)
class Finish:
    """The last thing a worker says about an attempt."""

    reason: FinishReason
    error: WireError | None = None  # set exactly when reason is ERROR
    cached_tokens: int = 0  # prompt tokens whose KV was not computed for this attempt
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptOutput:
    """What one engine step produced for one attempt."""

    attempt: AttemptId
    tokens: tuple[SampledToken, ...] = ()
    finish: Finish | None = None
