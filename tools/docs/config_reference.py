"""Tables of every option of every process, from the dataclasses that hold them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, get_type_hints

from typer.models import OptionInfo

from baton.cli.serve_options import ServeOptions
from baton.config import PREFIX, flag_of
from baton.worker.config import WorkerConfig
from conductor.config import ConductorConfig
from elastic_worker.__main__ import ElasticConfig
from kvstore.config import StoreConfig
from tools.docs.blocks import Blocks
from tools.docs.table import code, table

_HEADER = ("option", "variable", "default", "meaning")


def of_process(cls: type, without: type | None = None) -> str:
    """`without`: whose options are told elsewhere."""
    hints = get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(without)} if without else set()
    rows = [
        (
            code(flag_of(field.name)),
            code(PREFIX + field.name.upper()),
            _default(field.default),
            _meaning(field, hints[field.name]),
        )
        for field in dataclasses.fields(cls)
        if field.name not in known
    ]
    return table(_HEADER, rows)


def of_serve() -> str:
    hints = get_type_hints(ServeOptions, include_extras=True)
    rows = [
        (
            code(_serve_flag(field.name, said)),
            code(str(said.envvar or "")),
            "" if field.default is None else _default(field.default),
            said.help or "",
        )
        for field in dataclasses.fields(ServeOptions)
        if isinstance(said := hints[field.name].__metadata__[0], OptionInfo)
    ]
    return table(_HEADER, rows)


BLOCKS: Blocks = {
    "serve": of_serve,
    "conductor": partial(of_process, ConductorConfig),
    "worker": partial(of_process, WorkerConfig),
    "elastic": partial(of_process, ElasticConfig, WorkerConfig),
    "store": partial(of_process, StoreConfig),
}


def _default(value: Any) -> str:
    if value in ("", ()):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return code(f"{value:g}" if isinstance(value, float) else str(value))


def _meaning(field: dataclasses.Field[Any], hint: Any) -> str:
    choices = ", ".join(map(code, field.metadata["choices"]))
    several = "; several can be given" if hint == tuple[str, ...] else ""
    return f"{field.metadata['help']}{several}{f': {choices}' if choices else ''}"


def _serve_flag(name: str, said: OptionInfo) -> str:
    """In an annotation, typer's first argument is a name if there is one."""
    declared = (said.default, *(said.param_decls or ()))
    return next((name for name in declared if isinstance(name, str)), flag_of(name))
