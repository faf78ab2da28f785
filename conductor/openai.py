"""Bodies of the OpenAI-shaped endpoints: JSON in, an `Ask` out.

Types are checked here, strictly; ranges in `conductor.validate`. A field that baton does not have
is an error, never ignored; one that asks for nothing (null, false, empty) counts as not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from baton.errors import InvalidRequest
from conductor.body_errors import explain_fields, explain_json
from conductor.request import Ask, Chat, Options, Prompt
from conductor.validate import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_ANSWERS,
    MAX_LOGIT_BIAS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    make_chat,
    quote,
)

# Fields of OpenAI's and vLLM's APIs that have no counterpart here. Frameworks send many of them
# with a value that asks for nothing (null, false, empty), which is taken as not given.
UNSUPPORTED = frozenset(
    {
        "audio", "best_of", "function_call", "functions", "guided_json", "guided_regex", "logits",
        "metadata", "modalities", "parallel_tool_calls", "prediction", "prompt_logprobs",
        "reasoning_effort", "service_tier", "store", "suffix", "tool_choice", "tools",
        "use_beam_search", "verbosity", "web_search_options",
    }
)  # fmt: skip

MAX_FIELDS = 64  # of one object in a body

# What the fields below take that have a validator of their own, for the API's document.
_STRING = {"type": "string"}
_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_STOP = {
    "anyOf": [
        _STOP_STRING,
        {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS},
        {"type": "null"},
    ]
}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _STRING},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [_STRING, {"type": "array", "items": _PART}]}
_BIAS = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,18}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_LOGIT_BIAS,
}
_TOKENS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "minItems": 1,
            "maxItems": MAX_ANSWERS,
        },
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_ANSWERS},
    ]
}

Body = TypeVar("Body", bound=BaseModel)
Item = TypeVar("Item")
_List = Annotated[list[Item], Field(fail_fast=True)]


def _as_stop(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if value is None or isinstance(value, list):
        return value
    raise PydanticCustomError("stop_type", "must be a string or a list of strings")


def _as_prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        if len(value) > MAX_ANSWERS and type(value[0]) is not int:
            raise PydanticCustomError("prompts", f"must have at most {MAX_ANSWERS} prompts")
        if all(type(item) is str for item in value):
            return tuple(value)
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(
            isinstance(item, list) and all(type(number) is int for number in item) for item in value
        ):
            return tuple(tuple(item) for item in value)
    raise PydanticCustomError(
        "prompt_type",
        "must be a string, a list of strings, a list of token ids or a list of such lists",
    )


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        if (
            not isinstance(part, dict)
            or part.get("type") != "text"
            or set(part) != {"type", "text"}
        ):
            raise PydanticCustomError(
                "content_part",
                'must have parts of the form {"type": "text", "text": …} (only text is served)',
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content_part", "must have parts whose text is a string")
        texts.append(part["text"])
    return "\n".join(texts)


def _as_bias(value: object) -> dict[int, object]:
    if not isinstance(value, dict) or not all(_is_number(key) for key in value):
        raise PydanticCustomError("bias_type", "must map token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("bias_size", f"must have at most {MAX_LOGIT_BIAS} entries")
    return {int(key): bias for key, bias in value.items()}


def _is_number(key: str) -> bool:
    return key.isascii() and key.removeprefix("-").isdigit() and len(key) < 20


class _Object(BaseModel):
    """An object of a body. Lists in it fail with their first wrong item, and it may not have very
    many fields: collecting a million complaints about one body would stall every other request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: object) -> object:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"must have at most {MAX_FIELDS} fields")
        return data


class StreamOptions(_Object):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(_Object):
    model_config = ConfigDict(extra="allow", strict=True)

    type: str


class Message(_Object):
    role: str
    content: Annotated[str, BeforeValidator(_as_text), WithJsonSchema(_CONTENT)]


class _Common(_Object):
    """What both endpoints take. `user` is accepted for compatibility and changes nothing."""

    model: str
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: Annotated[_List[str] | None, BeforeValidator(_as_stop), WithJsonSchema(_STOP)] = None
    stop_token_ids: _List[int] | None = None
    seed: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: (
        Annotated[dict[int, float], BeforeValidator(_as_bias), WithJsonSchema(_BIAS)] | None
    ) = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = None
    cache_pin_s: float | None = None
    priority: int | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None  # vLLM's: choices also have their tokens' ids
    user: str | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_every_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def options(self, max_tokens: int | None, logprobs: int | None) -> Options:
        return Options(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            n=self.n,
        )

    def check(self) -> None:
        """Rules between fields. Raises InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options is only allowed together with stream=true", param="stream_options"
            )
        if self.response_format is not None and self.response_format.type != "text":
            raise InvalidRequest(
                f"response_format {quote(self.response_format.type)} is not supported: "
                'leave it out or use {"type": "text"}',
                param="response_format",
                code="unsupported_parameter",
            )

    def _ask(
        self,
        prompts: tuple[Prompt, ...],
        options: Options,
        names: Mapping[str, str],
        default_max_tokens: int | None,
        add_special_tokens: bool,
    ) -> Ask:
        self.check()
        return Ask(
            model=self.model,
            prompts=prompts,
            options=options,
            request_id=self.request_id,
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            cache_pin_s=self.cache_pin_s,
            default_max_tokens=default_max_tokens,
            add_special_tokens=add_special_tokens,
            skip_special_tokens=self.skip_special_tokens is not False,
            names=names,
        )


class CompletionBody(_Common):
    prompt: Annotated[tuple[Any, ...], BeforeValidator(_as_prompts), WithJsonSchema(_PROMPT)]
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None

    def to_ask(self) -> Ask:
        """Raises InvalidRequest for what the types alone cannot express."""
        if self.echo:
            raise InvalidRequest(
                "echo is not supported: prepend the prompt to the answer yourself",
                param="echo",
                code="unsupported_parameter",
            )
        options = self.options(self.max_tokens, self.logprobs)
        add_special = self.add_special_tokens is not False
        return self._ask(self.prompt, options, {}, DEFAULT_COMPLETION_TOKENS, add_special)


class ChatBody(_Common):
    messages: Annotated[_List[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def to_ask(self) -> Ask:
        """Raises InvalidRequest for what the types alone cannot express."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", param="top_logprobs")
        newer, older = self.max_completion_tokens, self.max_tokens
        if newer is not None and older is not None and newer != older:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ: give one of them",
                param="max_completion_tokens",
            )
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if newer is not None:
            names["max_tokens"] = "max_completion_tokens"
        options = self.options(
            older if newer is None else newer, (self.top_logprobs or 0) if self.logprobs else None
        )
        return self._ask((to_chat(self.messages),), options, names, None, False)


class TokenizeBody(_Object):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: _List[Message] | None = None
    add_special_tokens: bool = True

    def to_prompt(self) -> Prompt:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        if self.messages is not None:
            return to_chat(self.messages)
        return self.prompt or ""


class DetokenizeBody(_Object):
    model: str | None = None
    tokens: _List[int]


def to_chat(messages: list[Message]) -> Chat:
    return make_chat([(message.role, message.content) for message in messages])


def parse_body(cls: type[Body], raw: bytes) -> Body:
    """Raises InvalidRequest, which names the field, for anything but a well-formed body."""
    if not raw:
        raise InvalidRequest("the body is empty: send a JSON object")
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise explain_json(error) from None
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be a JSON object")
    for name in UNSUPPORTED & data.keys():
        value = data.pop(name)
        if not (value is None or value is False or value in ([], {}, "")):
            raise InvalidRequest(
                f"{name} is not supported here: leave it out",
                param=name,
                code="unsupported_parameter",
            )
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise explain_fields(error) from None
