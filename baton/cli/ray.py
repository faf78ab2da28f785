"""`baton ray`: a cluster on the machines of a Ray cluster."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from baton.cli.options import CaFile, Json, api_key
from baton.cli.report import Reporter
from baton.client.trust import trusted

app = typer.Typer(help="A cluster on several machines, placed by Ray.", no_args_is_help=True)

ConfigFile = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="What to run, as cluster.yaml.")
]


@app.command("up")
def up(
    config: ConfigFile = Path("cluster.yaml"), as_json: Json = False, ca_file: CaFile = ""
) -> None:
    """Place conductors, stores and workers, and keep them running until stopped.

    Meant for `ray job submit --working-dir . -- baton ray up --config cluster.yaml`.
    """
    # Ray and pydantic are slow to import, and other commands need neither.
    from baton.ray.config import load_config
    from baton.ray.up import up as run

    with Reporter(as_json, verbose=True) as reporter:
        asyncio.run(run(load_config(config, os.environ), reporter, api_key(), trusted(ca_file)))
