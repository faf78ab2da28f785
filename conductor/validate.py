"""The one validation behind HTTP and gRPC: an `Ask` becomes a `Request` or an InvalidRequest.

Options are checked before the prompt is tokenized, so that a bad request costs nothing.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from baton.errors import InvalidRequest, ModelNotFound
from baton.types.request import MAX_PIN_S, SamplingParams
from conductor.request import Answer, Ask, Chat, Options, Request, Sent, Tracing
from conductor.tenants.tenant import ANYBODY, Tenant

MAX_ANSWERS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_TOKENS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
LEAST_REPETITION_PENALTY = 0.01  # logits are divided by it, and have to stay finite
MAX_SALT_LENGTH = 256  # characters
MAX_QUOTE = 80  # characters of a client's text that a message repeats
ROLES = ("system", "developer", "user", "assistant")
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default where the prompt is not a conversation
REQUEST_ID = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
_REQUEST_ID = re.compile(REQUEST_ID)
_INT32 = 2**31


@dataclass(frozen=True, slots=True)
class Limits:
    """What can be served. `context` is in tokens, prompt and answer together: what the model, or
    the workers' option --max-model-len, allows, or less where no worker's pool holds that much."""

    model_name: str
    vocab_size: int
    context: int
    remedy: str = "shorten the prompt"
    max_prompt: int | None = None  # tokens of one prompt, where less is allowed than would fit
    max_output: int | None = None  # the same of one answer

    def narrowed(self, max_prompt: int | None, max_output: int | None) -> Limits:
        """The smaller of both."""
        if max_prompt is None and max_output is None:
            return self
        return replace(
            self,
            max_prompt=_least(self.max_prompt, max_prompt),
            max_output=_least(self.max_output, max_output),
        )


def _least(one: int | None, other: int | None) -> int | None:
    return min((each for each in (one, other) if each is not None), default=None)


def quote(text: str) -> str:
    """A client's text inside a message, shortened."""
    return repr(text if len(text) <= MAX_QUOTE else text[:MAX_QUOTE] + "…")


def check_model(model: str, limits: Limits) -> None:
    """Raises ModelNotFound unless this cluster serves `model`."""
    if model != limits.model_name:
        raise ModelNotFound(
            f"the model {quote(model)} does not exist here; "
            f"this cluster serves {limits.model_name!r}",
            param="model",
        )


def check_ask(ask: Ask, limits: Limits) -> SamplingParams:
    """Everything that can be checked without tokenizing. `max_tokens` is 0 when it is not given.

    Raises InvalidRequest, which names the offending field.
    """
    check_model(ask.model, limits)
    if not ask.prompts:
        raise InvalidRequest("the prompt is empty: give at least one prompt", param="prompt")
    for prompt in ask.prompts:
        if isinstance(prompt, tuple):
            check_token_ids(prompt, limits, "prompt")
    if ask.request_id is not None and not _REQUEST_ID.fullmatch(ask.request_id):
        raise InvalidRequest(
            "request_id must be 1 to 128 letters, digits, '.', '_', ':' or '-', "
            "and begin with a letter or a digit",
            param="request_id",
        )
    _whole(ask.priority, "priority", -_INT32, _INT32 - 1)
    if len(ask.cache_salt) > MAX_SALT_LENGTH:
        raise InvalidRequest(
            f"cache_salt must have at most {MAX_SALT_LENGTH} characters", param="cache_salt"
        )
    _number(ask.cache_pin_s, "cache_pin_s", 0.0, MAX_PIN_S, 0.0, above=True)
    return _check_options(ask.options, ask.names, limits, len(ask.prompts))


def check_token_ids(ids: Sequence[int], limits: Limits, param: str) -> None:
    """Raises InvalidRequest when an id is not in the model's vocabulary."""
    if ids and not 0 <= min(ids) <= max(ids) < limits.vocab_size:
        wrong = next(number for number in ids if not 0 <= number < limits.vocab_size)
        raise InvalidRequest(
            f"token id {wrong} is out of range: the vocabulary is 0 to {limits.vocab_size - 1}",
            param=param,
        )


def make_chat(messages: Sequence[tuple[str, str]]) -> Chat:
    """From (role, content) pairs. Raises InvalidRequest for a role that templates do not know."""
    if not messages:
        raise InvalidRequest("messages is empty: give at least one message", param="messages")
    for place, (role, _) in enumerate(messages):
        if role not in ROLES:
            raise InvalidRequest(
                f"role {quote(role)} is not supported: use one of {', '.join(ROLES)}",
                param=f"messages.{place}.role",
            )
    # `developer` is OpenAI's newer name for `system`; templates know the older one.
    return Chat(
        tuple(
            {"role": "system" if role == "developer" else role, "content": content}
            for role, content in messages
        )
    )


def build_request(
    ask: Ask,
    sampling: SamplingParams,
    prompts: Sequence[tuple[int, ...]],
    limits: Limits,
    *,
    key: str,
    received: float,
    deadline: float,
    tracing: Tracing,
    tenant: Tenant = ANYBODY,
    sent: tuple[Sent, ...] = (),
) -> Request:
    """Join what `check_ask` returned with the tokenized prompts. Raises InvalidRequest."""
    n = ask.options.n or 1
    answers: list[Answer] = []
    for place, prompt in enumerate(prompts):
        fitted = _fit(ask, sampling, prompt, limits)
        for choice in range(n):
            seed = (fitted.seed + choice) % 2**64
            answers.append(Answer(len(answers), place, prompt, replace(fitted, seed=seed)))
    return Request(
        id=ask.request_id or key.rpartition(".")[0],
        key=key,
        model=ask.model,
        answers=tuple(answers),
        stop=ask.options.stop,
        skip_special_tokens=ask.skip_special_tokens,
        priority=ask.priority,
        cache_salt=ask.cache_salt,
        cache_pin_s=ask.cache_pin_s,
        received=received,
        deadline=deadline,
        operation="chat" if isinstance(ask.prompts[0], Chat) else "text_completion",
        tracing=tracing,
        tenant=tenant,
        sent=sent,
    )


def _fit(
    ask: Ask, sampling: SamplingParams, prompt: tuple[int, ...], limits: Limits
) -> SamplingParams:
    param = ask.names.get("prompt", "prompt")
    if not prompt:
        raise InvalidRequest("the prompt is empty: give at least one token", param=param)
    if limits.max_prompt is not None and len(prompt) > limits.max_prompt:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, at most {limits.max_prompt} are allowed here",
            param=param,
            code="prompt_too_long",
        )
    room = limits.context - len(prompt)
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, but the context is {limits.context} tokens, "
            f"of which at least one is for the answer: {limits.remedy}",
            param=param,
            code="context_length_exceeded",
        )
    field = ask.names.get("max_tokens", "max_tokens")
    most = room if limits.max_output is None else min(room, limits.max_output)
    wanted = sampling.max_tokens or min(most, ask.default_max_tokens or most)
    if limits.max_output is not None and wanted > limits.max_output:
        raise InvalidRequest(
            f"{field} is {wanted}, at most {limits.max_output} are allowed here",
            param=field,
            code="max_tokens_too_large",
        )
    if wanted > room:
        raise InvalidRequest(
            f"{field} is {wanted}, but after a prompt of {len(prompt)} tokens only {room} of the "
            f"context's {limits.context} tokens are left: lower {field} or {limits.remedy}",
            param=field,
            code="context_length_exceeded",
        )
    if sampling.min_tokens > wanted:
        raise InvalidRequest(
            f"min_tokens is {sampling.min_tokens}, more than {field}, which is {wanted}",
            param="min_tokens",
        )
    return replace(sampling, max_tokens=wanted)


def _check_options(
    options: Options, names: Mapping[str, str], limits: Limits, num_prompts: int
) -> SamplingParams:
    n = _whole(options.n, "n", 1, MAX_ANSWERS) or 1
    if n * num_prompts > MAX_ANSWERS:
        raise InvalidRequest(
            f"{num_prompts} prompts with n={n} are more than {MAX_ANSWERS} answers: "
            "send several requests",
            param="n",
        )
    _check_stop(options, limits)
    top_k = _whole(options.top_k, "top_k", -1, _INT32 - 1) or 0
    logprobs = _whole(options.logprobs, names.get("logprobs", "logprobs"), 0, MAX_LOGPROBS)
    seed = _whole(options.seed, "seed", -(2**63), 2**64 - 1)
    return SamplingParams(
        temperature=_number(options.temperature, "temperature", 0.0, 2.0, 1.0),
        top_p=_number(options.top_p, "top_p", 0.0, 1.0, 1.0, above=True),
        top_k=min(max(top_k, 0), limits.vocab_size),
        min_p=_number(options.min_p, "min_p", 0.0, 1.0, 0.0),
        presence_penalty=_number(options.presence_penalty, "presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=_number(options.frequency_penalty, "frequency_penalty", -2.0, 2.0, 0.0),
        repetition_penalty=_number(
            options.repetition_penalty, "repetition_penalty", LEAST_REPETITION_PENALTY, 100.0, 1.0
        ),
        logit_bias=_check_bias(options.logit_bias or {}, limits),
        seed=secrets.randbits(64) if seed is None else seed % 2**64,
        max_tokens=_whole(options.max_tokens, names.get("max_tokens", "max_tokens"), 1, _INT32 - 1)
        or 0,
        min_tokens=_whole(options.min_tokens, "min_tokens", 0, _INT32 - 1) or 0,
        ignore_eos=bool(options.ignore_eos),
        stop_token_ids=tuple(dict.fromkeys(options.stop_token_ids)),
        logprobs=logprobs,
    )


def _check_stop(options: Options, limits: Limits) -> None:
    if len(options.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"stop has {len(options.stop)} strings, at most {MAX_STOP_STRINGS} are allowed",
            param="stop",
        )
    if not all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in options.stop):
        raise InvalidRequest(
            f"each stop string must have 1 to {MAX_STOP_LENGTH} characters", param="stop"
        )
    if len(options.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidRequest(
            f"stop_token_ids has {len(options.stop_token_ids)} ids, "
            f"at most {MAX_STOP_TOKENS} are allowed",
            param="stop_token_ids",
        )
    check_token_ids(options.stop_token_ids, limits, "stop_token_ids")


def _check_bias(bias: Mapping[int, float], limits: Limits) -> tuple[tuple[int, float], ...]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"logit_bias has {len(bias)} entries, at most {MAX_LOGIT_BIAS} are allowed",
            param="logit_bias",
        )
    check_token_ids(tuple(bias), limits, "logit_bias")
    return tuple(
        (token_id, _number(value, "logit_bias", -100.0, 100.0, 0.0))
        for token_id, value in bias.items()
    )


def _number(
    value: float | None, name: str, low: float, high: float, default: float, above: bool = False
) -> float:
    """`value` in [low, high], or in (low, high] with `above`."""
    if value is None:
        return default
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        relation = "greater than" if above else "at least"
        raise InvalidRequest(
            f"{name} must be a number {relation} {low:g} and at most {high:g}, not {value}",
            param=name,
        )
    return float(value)


def _whole(value: int | None, name: str, low: int, high: int) -> int | None:
    if value is not None and not low <= value <= high:
        raise InvalidRequest(
            f"{name} must be a whole number from {low} to {high}, not {value}", param=name
        )
    return value
