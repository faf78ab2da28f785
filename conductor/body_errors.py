"""What is wrong with a request's body, in words: the field, what it must be, what it was."""

from __future__ import annotations

import re
from typing import Any

import orjson
from pydantic import ValidationError

from baton.errors import InvalidRequest
from conductor.validate import quote

_MUST = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "string_type": "must be a string",
}
MAX_SHOWN = 60  # characters of a wrong value that a message repeats
_NEAR = 30  # characters shown before and after the place where JSON ends to be JSON
_KEY_BEFORE = re.compile(r'"([A-Za-z_]{1,64})"\s*:\s*-?$')


def explain_json(error: orjson.JSONDecodeError) -> InvalidRequest:
    """For a body that is not JSON. Names the field when it is a value such as NaN."""
    before = error.doc[max(0, error.pos - 3 * _NEAR) : error.pos]
    message = f"the body is not valid JSON (in UTF-8): {error}"
    if error.doc:
        near = before[-_NEAR:] + error.doc[error.pos : error.pos + _NEAR]
        message += f", near {quote(near)}"
    key = _KEY_BEFORE.search(before)
    return InvalidRequest(message, param=key[1] if key else None)


def explain_fields(error: ValidationError) -> InvalidRequest:
    """For the first field of a body that is not as it must be."""
    problem = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in problem["loc"])[:128]
    if problem["type"] == "extra_forbidden":
        return InvalidRequest(
            f"unknown field {param}: remove it or correct its name",
            param=param,
            code="unknown_parameter",
        )
    if problem["type"] == "missing":
        return InvalidRequest(f"{param} is missing: add it", param=param, code="missing_parameter")
    if problem["type"] == "too_short":
        return InvalidRequest(f"{param} is empty: give at least one entry", param=param)
    must = _MUST.get(problem["type"], problem["msg"])
    return InvalidRequest(
        f"{param or 'the body'} {must}, not {_describe(problem['input'])}", param=param or None
    )


def _describe(value: Any) -> str:
    """As JSON, shortened."""
    text = orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
