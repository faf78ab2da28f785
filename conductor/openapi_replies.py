"""Schemas of what the HTTP API answers: see `conductor.openapi`."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

_TEXT: Json = {"type": "string"}
_WHOLE: Json = {"type": "integer", "minimum": 0}
_NUMBER: Json = {"type": "number"}
_MAYBE_TEXT: Json = {"type": ["string", "null"]}
_IDS: Json = {"type": "array", "items": _WHOLE}


def _object(optional: Json | None = None, /, **fields: Json) -> Json:
    """All of `fields` are always there, and nothing else but what is `optional`."""
    properties = {**fields, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": list(fields),
        "additionalProperties": False,
    }


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _open(**fields: Json) -> Json:
    """More may be there: what is told of workers, stores and requests grows."""
    return {"type": "object", "properties": fields, "required": list(fields)}


ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT))

_FINISH: Json = {"type": ["string", "null"], "enum": ["stop", "length", None]}
_USAGE = _object(
    prompt_tokens=_WHOLE,
    completion_tokens=_WHOLE,
    total_tokens=_WHOLE,
    prompt_tokens_details=_object(cached_tokens=_WHOLE),
)
_TOKEN = {"token": _TEXT, "logprob": {"type": ["number", "null"]}, "bytes": _IDS}
_CHAT_LOGPROBS = _object(
    content=_list(_object(**_TOKEN, top_logprobs=_list(_object(**_TOKEN)))),
    refusal={"type": "null"},
)
_LOGPROBS = _object(
    tokens=_list(_TEXT),
    token_logprobs=_list({"type": ["number", "null"]}),
    top_logprobs=_list({"type": "object", "additionalProperties": _NUMBER}),
    text_offset=_list(_WHOLE),
)
_HEAD: dict[str, Json] = {"id": _TEXT, "created": _WHOLE, "model": _TEXT, "usage": _USAGE}


def _maybe(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


_STAGES = _list(_open(name=_TEXT, start_s=_NUMBER, end_s=_NUMBER, seconds=_NUMBER))

_MODEL = _object(
    id=_TEXT,
    object={"const": "model"},
    created=_WHOLE,
    owned_by=_TEXT,
    max_model_len=_WHOLE,
)
_MEMBER = _open(name=_TEXT, role=_TEXT, address=_TEXT, incarnation=_TEXT, state=_TEXT)

REPLIES: dict[str, Json] = {
    "ChatAnswer": _object(
        **_HEAD,
        object={"const": "chat.completion"},
        choices=_list(
            _object(
                {"token_ids": _IDS},
                index=_WHOLE,
                message=_object(
                    role={"const": "assistant"}, content=_TEXT, refusal={"type": "null"}
                ),
                logprobs=_maybe(_CHAT_LOGPROBS),
                finish_reason=_FINISH,
            )
        ),
    ),
    "Answer": _object(
        **_HEAD,
        object={"const": "text_completion"},
        choices=_list(
            _object(
                {"token_ids": _IDS},
                index=_WHOLE,
                text=_TEXT,
                logprobs=_maybe(_LOGPROBS),
                finish_reason=_FINISH,
            )
        ),
    ),
    "Cluster": _object(
        conductors=_list(_MEMBER),
        workers=_list(_MEMBER),
        stores=_list(_MEMBER),
        refused=_list(_open(name=_TEXT, role=_TEXT, address=_TEXT, reason=_TEXT)),
    ),
    "Live": _open(
        time_s=_NUMBER,
        model=_TEXT,
        ready={"type": "boolean"},
        conductors=_list(_MEMBER),
        workers=_list(_MEMBER),
        stores=_list(_MEMBER),
        periods=_list(_open(period_s=_WHOLE, requests=_WHOLE, requests_per_s=_NUMBER)),
        flows=_list(_open(source=_TEXT, target=_TEXT, kind=_TEXT, bytes=_WHOLE)),
        requests=_list(_open(id=_TEXT, outcome=_TEXT, received_s=_NUMBER)),
    ),
    "Model": _MODEL,
    "Models": _object(object={"const": "list"}, data=_list(_MODEL)),
    "Status": _object(status=_TEXT),
    "Text": _object(prompt=_TEXT),
    "Tokens": _object(tokens=_IDS, count=_WHOLE, max_model_len=_WHOLE),
    "Trace": _open(
        request_id=_TEXT,
        trace_id=_TEXT,
        outcome=_MAYBE_TEXT,
        received_s=_NUMBER,
        ttft_s=_maybe(_NUMBER),
        ttft_attributed=_maybe(_NUMBER),
        ttft_stages=_STAGES,
        second_token_stages=_STAGES,
        attempts=_list({"type": "object"}),
        spans=_list(_open(source=_TEXT, name=_TEXT, start_s=_NUMBER, end_s=_NUMBER)),
    ),
}
