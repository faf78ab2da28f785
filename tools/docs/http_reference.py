"""Tables of the HTTP API, from the document that a conductor gives to its clients."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from baton.demo import demo_model_path
from baton.model.spec import load_spec
from conductor.openapi import make_document
from conductor.openapi_replies import REPLIES
from conductor.validate import Limits
from tools.docs.blocks import Blocks
from tools.docs.table import code, table

Json = dict[str, Any]

_REF = "#/components/schemas/"


def endpoints() -> str:
    rows = [
        (
            f"`{method.upper()} {path}`",
            operation["summary"],
            _content(operation.get("requestBody", {})),
            _content(operation["responses"]["200"]),
            ", ".join(sorted(set(operation["responses"]) - {"200"})),
        )
        for path, methods in _document()["paths"].items()
        for method, operation in methods.items()
    ]
    return table(("endpoint", "what it gives", "body", "reply", "errors"), rows)


def errors() -> str:
    meanings = {
        status: reply["description"]
        for methods in _document()["paths"].values()
        for operation in methods.values()
        for status, reply in operation["responses"].items()
        if status >= "400" and "Error" in _content(reply)
    }
    return table(("status", "meaning"), sorted(meanings.items()))


def bodies() -> str:
    return _tables(lambda name: name not in REPLIES and name != "Error", _body_note)


def replies() -> str:
    return _tables(lambda name: name in REPLIES or name == "Error", _reply_note)


BLOCKS: Blocks = {
    "endpoints": endpoints,
    "errors": errors,
    "bodies": bodies,
    "replies": replies,
}


@cache
def _document() -> Json:
    spec = load_spec(demo_model_path())
    return make_document(Limits("demo", spec.vocab_size, spec.max_model_len), with_key=True)


def _content(message: Json) -> str:
    """What a body or reply is: a link to its schema, or its type of content."""
    kinds = message.get("content", {})
    found = [
        _kind(said["schema"]) if "$ref" in said["schema"] else code(kind)
        for kind, said in kinds.items()
    ]
    return " or ".join(found)


def _tables(wanted: Callable[[str], bool], note: Callable[[bool], str]) -> str:
    schemas = _document()["components"]["schemas"]
    names = sorted(filter(wanted, schemas), key=lambda name: (not name.endswith("Body"), name))
    return "\n".join(f"### {name}\n\n{_fields(schemas[name], note)}" for name in names)


def _body_note(required: bool) -> str:
    return "**Required.** " if required else ""


def _reply_note(required: bool) -> str:
    return "" if required else "Only where it was asked for. "


def _fields(schema: Json, note: Callable[[bool], str]) -> str:
    rows = [
        (code(path), _kind(_given(field)), note(required) + field.get("description", ""))
        for path, field, required in _inside("", schema)
        if not _is_nothing(field)
    ]
    text = table(("field", "type", "meaning"), rows)
    unsupported = [name for name, field in schema["properties"].items() if _is_nothing(field)]
    if unsupported:
        names = ", ".join(map(code, unsupported))
        text += f"\nTaken only with a value that asks for nothing: {names}.\n"
    return text


def _is_nothing(field: Json) -> bool:
    return "enum" in field and [] in field["enum"]


def _inside(path: str, schema: Json) -> Iterator[tuple[str, Json, bool]]:
    """(path, schema, whether it is always there) of the fields of objects in `schema`."""
    for part in schema.get("anyOf", [schema]):
        if part.get("type") == "array":
            yield from _inside(f"{path}[]", part.get("items", {}))
        for name, field in part.get("properties", {}).items():
            inner = f"{path}.{name}" if path else name
            yield inner, field, name in part.get("required", ())
            yield from _inside(inner, field)


def _given(field: Json) -> Json:
    """Without null where that only means that a field is left out."""
    if field.get("default", ...) is not None or "anyOf" not in field:
        return field
    return {"anyOf": [part for part in field["anyOf"] if part.get("type") != "null"]}


def _kind(schema: Json) -> str:
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_REF)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_kind, schema["anyOf"])))
    if "const" in schema or "enum" in schema:
        return " or ".join(map(_value, schema.get("enum", [schema.get("const")])))
    if isinstance(schema["type"], list):
        return " or ".join(schema["type"])
    if schema["type"] == "array":
        most = f"up to {schema['maxItems']} " if "maxItems" in schema else ""
        return f"list of {most}{_several(_kind(schema['items']))}"
    if "maxLength" in schema:
        return f"{schema['type']} of up to {schema['maxLength']} characters"
    return f"{schema['type']}{_range(schema)}"


def _several(kind: str) -> str:
    return re.sub(r"^(list|string|object|integer|number)\b", r"\1s", kind)


def _value(value: Any) -> str:
    return "null" if value is None else code(f'"{value}"')


def _range(schema: Json) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if most is not None and most >= 2**31 - 1:
        most = None
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']}" + ("" if most is None else f", to {most:g}")
    if most is None and (least == 0 or least is None or least < -1):
        return ""  # a count, or whatever the type holds
    return f" from {least}" + ("" if most is None else f" to {most:g}")
