"""`GET /openapi.json`: what the HTTP API takes and gives, as a document for clients and generators.

Request bodies come from the models that parse them (`conductor.openai`), with the ranges that
`conductor.validate` checks; replies are described in `conductor.openapi_replies`. A test sends what
this document allows and forbids, and compares.
"""

from __future__ import annotations

from copy import deepcopy
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel

from conductor.openai import (
    MAX_FIELDS,
    UNSUPPORTED,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from conductor.openapi_fields import MEANINGS, NOTHING, RANGES
from conductor.openapi_replies import ERROR, REPLIES
from conductor.validate import ROLES, Limits

Json = dict[str, Any]

_ALWAYS = ("400", "408", "413")
_BUSY = ("409", "429", "502", "503", "504")
_LAST_EVENT_ID: Json = {
    "name": "Last-Event-ID",
    "in": "header",
    "schema": {"type": "string"},
    "description": "With `stream`: the id of the last event that came, to get the rest.",
}


def make_document(limits: Limits, with_key: bool) -> Json:
    """`with_key`: the guarded endpoints ask for an API key."""
    schemas = {"Error": ERROR, **REPLIES}
    bodies: tuple[type[BaseModel], ...] = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
    for body in bodies:
        schema = deepcopy(body.model_json_schema(ref_template="#/components/schemas/{model}"))
        for name, part in schema.pop("$defs", {}).items():
            schemas[name] = _inner(name, part)
        schemas[body.__name__] = _body(schema, limits)
    paths = {**_open_paths(), **_guarded_paths(with_key)}
    document: Json = {
        "openapi": "3.1.0",
        "info": {"title": "baton", "version": version("baton-llm"), "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if with_key:
        scheme = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"key": scheme}
    return document


_ABOUT = (
    "OpenAI's endpoints for one model. A field that is not listed is an error, never ignored. "
    "Options that make no sense together (min_tokens above max_tokens, stream_options without "
    "stream, more tokens than the context has) are errors with status 400, too."
)


def _open_paths() -> Json:
    return {
        "/openapi.json": {"get": _get("This document", {"type": "object"}, ())},
        "/health": {"get": _get("The process answers", _ref("Status"), ())},
        "/ready": {
            "get": _get("A request would succeed", _ref("Status"), ())
            | {"responses": {code: _json("Status", _ref("Status")) for code in ("200", "503")}}
        },
        "/metrics": {
            "get": {
                "summary": "Prometheus metrics",
                "responses": {"200": _content("Metrics", {"text/plain": {"type": "string"}})},
            }
        },
        "/cluster": {"get": _get("Conductors, workers and stores", _ref("Cluster"), ())},
    }


def _guarded_paths(with_key: bool) -> Json:
    paths: Json = {
        "/v1/chat/completions": _generation("An answer to messages", "ChatBody", "ChatAnswer"),
        "/v1/completions": _generation("An answer to a prompt", "CompletionBody", "Answer"),
        "/v1/models": {"get": _get("The served model", _ref("Models"), ())},
        "/v1/models/{name}": {"get": _named("The served model", "name", "Model")},
        "/tokenize": _post("Text or messages to token ids", "TokenizeBody", "Tokens"),
        "/detokenize": _post("Token ids to text", "DetokenizeBody", "Text"),
        "/live.json": {"get": _get("The cluster now, and the last requests", _ref("Live"), ())},
        "/trace/{request_id}": {
            "get": _named("The timeline of a recent request", "request_id", "Trace")
        },
    }
    if with_key:
        for path in paths.values():
            for operation in path.values():
                operation["security"] = [{"key": []}]
                operation["responses"] |= {code: _error(code) for code in ("401", "403")}
    return paths


def _get(summary: str, schema: Json, errors: tuple[str, ...]) -> Json:
    responses = {"200": _json("OK", schema)} | {code: _error(code) for code in errors}
    return {"summary": summary, "responses": responses}


def _named(summary: str, name: str, reply: str) -> Json:
    parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    return _get(summary, _ref(reply), ("404",)) | {"parameters": [parameter]}


def _post(summary: str, body: str, reply: str, errors: tuple[str, ...] = ("404",)) -> Json:
    operation = _get(summary, _ref(reply), (*_ALWAYS, *errors))
    content = {"application/json": {"schema": _ref(body)}}
    return {"post": operation | {"requestBody": {"required": True, "content": content}}}


def _generation(summary: str, body: str, reply: str) -> Json:
    path = _post(summary, body, reply, ("404", *_BUSY))
    operation = path["post"]
    operation["parameters"] = [_LAST_EVENT_ID]
    operation["responses"]["200"]["content"]["text/event-stream"] = {
        "schema": {"type": "string", "description": "With `stream`: chunks, then [DONE]."}
    }
    return path


def _json(description: str, schema: Json) -> Json:
    return _content(description, {"application/json": schema})


def _content(description: str, by_type: Json) -> Json:
    content = {kind: {"schema": schema} for kind, schema in by_type.items()}
    return {"description": description, "content": content}


def _error(code: str) -> Json:
    return _json(_MEANINGS[code], _ref("Error"))


_MEANINGS = {
    "400": "The request is wrong: `param` names the field",
    "401": "No valid API key",
    "403": "The API key's tenant may not do this",
    "404": "There is no such model or trace",
    "408": "The body came too slowly",
    "413": "The body is too large",
    "429": "Too much in progress: Retry-After says when to try again",
    "409": "The client came back for this answer on another connection",
    "502": "A worker was lost while it held the request",
    "503": "No worker can take the request now",
    "504": "The deadline passed",
}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


# -- bodies ----------------------------------------------------------------------------------------


def _body(schema: Json, limits: Limits) -> Json:
    """What pydantic says of the types, and what is checked beyond them."""
    fields: Json = schema["properties"]
    for name, field in fields.items():
        field.pop("title", None)
        field["description"] = MEANINGS[name]
        if name in RANGES:
            _value(field).update(RANGES[name])
    if "logprobs" in fields and _value(fields["logprobs"])["type"] == "integer":
        _value(fields["logprobs"]).update(RANGES["top_logprobs"])
    token = {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}
    for name in ("tokens", "stop_token_ids"):
        if name in fields:
            _value(fields[name])["items"] = token
    if "prompt" in fields and "anyOf" in fields["prompt"]:
        for choice in fields["prompt"]["anyOf"]:
            _limit_tokens(choice, token)
    _value(fields["model"])["enum"] = [limits.model_name]
    if "max_tokens" in fields:
        fields |= dict.fromkeys(sorted(UNSUPPORTED - fields.keys()), NOTHING)
    return {**schema, "properties": fields, "maxProperties": MAX_FIELDS}


def _inner(name: str, schema: Json) -> Json:
    for key, field in schema["properties"].items():
        field.pop("title", None)
        field["description"] = MEANINGS[key]
    if name == "Message":
        schema["properties"]["role"]["enum"] = list(ROLES)
    if name == "ResponseFormat":
        schema["properties"]["type"]["enum"] = ["text"]
    return {**schema, "maxProperties": MAX_FIELDS}


def _value(field: Json) -> Json:
    """Its schema when it is given: the one that is not null."""
    choices = [part for part in field.get("anyOf", [field]) if part.get("type") != "null"]
    found: Json = choices[0]
    return found


def _limit_tokens(schema: Json, token: Json) -> None:
    """In lists of integers, at whatever depth."""
    items = schema.get("items")
    if items is None:
        return
    if items.get("type") == "integer":
        schema["items"] = token
    else:
        _limit_tokens(items, token)
