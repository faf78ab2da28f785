"""Command line options that are shared, and commands made from frozen dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from baton.client.http import Client
from baton.client.trust import CA_FLAG, CA_VARIABLE, trusted

Options = TypeVar("Options")

Url = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="BATON_URL",
        help="Address of the cluster; A,B: of several conductors. https: see --ca-file.",
        metavar="URL",
    ),
]
CaFile = Annotated[
    str,
    typer.Option(
        CA_FLAG,
        envvar=CA_VARIABLE,
        metavar="FILE",
        help="For https: authorities (PEM) to trust, instead of the system's.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def connect(url: str, ca_file: str, timeout_s: float = 120.0) -> Client:
    """A client with the key of BATON_API_KEY, the same variable that the conductor knows. Raises
    ConfigError."""
    return Client(url, timeout_s, api_key=api_key(), tls=trusted(ca_file))


def api_key() -> str:
    return os.environ.get("BATON_API_KEY", "").split(",")[0].strip()


def command(cls: type[Options], run: Callable[[Options], None]) -> Callable[..., None]:
    """A function for typer whose parameters are the fields of the dataclass `cls`.

    So a command with many options lists each of them once, as an annotated field with a default.
    """
    hints = get_type_hints(cls, include_extras=True)

    def invoke(**values: Any) -> None:
        run(cls(**values))

    invoke.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        ]
    )
    invoke.__annotations__ = hints
    invoke.__doc__ = run.__doc__
    return invoke
