"""Tables of the gRPC services and messages, from the .proto files and the comments in them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from google.protobuf import descriptor_pb2 as pb

from tools.docs.blocks import Blocks
from tools.docs.table import code, table

PROTO_ROOT = Path(__file__).resolve().parents[2] / "proto"
PACKAGE = "baton/v1"
PROTOC_S = 60.0

PUBLIC = "inference"
INTERNAL = ("fleet", "worker", "handoff", "blocks", "common")

# Field numbers of protobuf's own descriptors, of which the paths of comments are made.
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_MEMBER = 2  # of a message, an enum and a service alike

_Field = pb.FieldDescriptorProto


@dataclass(frozen=True, slots=True)
class _Source:
    """A .proto file. Comments are found by the path of what they are about."""

    file: pb.FileDescriptorProto
    comments: dict[tuple[int, ...], str]

    def about(self, *path: int) -> str:
        return self.comments.get(path, "")


def public() -> str:
    return _part(PUBLIC)


def internal() -> str:
    return "\n".join(map(_part, INTERNAL))


BLOCKS: Blocks = {"public": public, "internal": internal}


@cache
def _sources() -> dict[str, _Source]:
    """By the name of the file without its ending. Raises SystemExit when protoc refuses."""
    names = [path.name for path in sorted((PROTO_ROOT / PACKAGE).glob("*.proto"))]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "all"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO_ROOT}"]
        command += ["--include_source_info", f"--descriptor_set_out={out}"]
        command += [str(PROTO_ROOT / PACKAGE / name) for name in names]
        if subprocess.run(command, check=False, timeout=PROTOC_S).returncode != 0:
            raise SystemExit("protoc failed; fix the .proto files that it names above")
        files = pb.FileDescriptorSet.FromString(out.read_bytes()).file
    return {Path(file.name).stem: _Source(file, _comments(file)) for file in files}


def _comments(file: pb.FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {
        tuple(place.path): " ".join(place.leading_comments.split())
        for place in file.source_code_info.location
        if place.leading_comments
    }


def _part(name: str) -> str:
    source = _sources()[name]
    return "\n".join((*_services(source), *_messages(source), *_enums(source)))


def _services(source: _Source) -> Iterator[str]:
    for number, service in enumerate(source.file.service):
        rows = [
            (
                code(method.name),
                _stream(method.client_streaming, method.input_type),
                _stream(method.server_streaming, method.output_type),
                source.about(_SERVICE, number, _MEMBER, index),
            )
            for index, method in enumerate(service.method)
        ]
        methods = table(("method", "takes", "gives", "meaning"), rows)
        yield _section(f"service {service.name}", source.about(_SERVICE, number), methods)


def _messages(source: _Source) -> Iterator[str]:
    for number, message in enumerate(source.file.message_type):
        rows = [
            (
                str(field.number),
                code(field.name),
                _type(message, field),
                source.about(_MESSAGE, number, _MEMBER, index),
            )
            for index, field in enumerate(message.field)
        ]
        fields = table(("number", "field", "type", "meaning"), rows) if rows else "No fields.\n"
        yield _section(message.name, source.about(_MESSAGE, number), fields)


def _enums(source: _Source) -> Iterator[str]:
    for number, enum in enumerate(source.file.enum_type):
        rows = [
            (str(value.number), code(value.name), source.about(_ENUM, number, _MEMBER, index))
            for index, value in enumerate(enum.value)
        ]
        values = table(("number", "value", "meaning"), rows)
        yield _section(enum.name, source.about(_ENUM, number), values)


def _section(title: str, about: str, content: str) -> str:
    return f"### {title}\n\n" + (f"{about}\n\n" if about else "") + content


def _type(message: pb.DescriptorProto, field: pb.FieldDescriptorProto) -> str:
    inner = {part.name: part for part in message.nested_type if part.options.map_entry}
    entry = inner.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = entry.field
        return f"map of {_plain(key)} to {_plain(value)}"
    if field.label == _Field.LABEL_REPEATED:
        return f"repeated {_plain(field)}"
    if field.proto3_optional:
        return f"optional {_plain(field)}"
    if field.HasField("oneof_index"):
        return f"{_plain(field)}, one of {code(message.oneof_decl[field.oneof_index].name)}"
    return _plain(field)


def _plain(field: pb.FieldDescriptorProto) -> str:
    if field.type_name:
        return _link(field.type_name)
    return str(_Field.Type.Name(field.type)).removeprefix("TYPE_").lower()


def _stream(streaming: bool, type_name: str) -> str:
    return ("stream of " if streaming else "") + _link(type_name)


def _link(type_name: str) -> str:
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"
