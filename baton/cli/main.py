"""The `baton` command line."""

from __future__ import annotations

import sys

import typer

from baton import __version__
from baton.cli.bench import BenchServeOptions, bench_serve
from baton.cli.bench_engine import BenchEngineOptions, bench_engine
from baton.cli.bench_handoff import BenchHandoffOptions, bench_handoff
from baton.cli.bench_process import PASS_ON, bench_router, bench_store
from baton.cli.chat import chat
from baton.cli.doctor.command import doctor
from baton.cli.generate import generate
from baton.cli.keys import keys
from baton.cli.options import command
from baton.cli.ray import app as ray
from baton.cli.serve import serve
from baton.cli.serve_options import ServeOptions
from baton.cli.sim import plan, sim
from baton.cli.status import status
from baton.cli.top import top
from baton.cli.trace import trace
from baton.errors import BatonError

app = typer.Typer(
    name="baton",
    help="Serve large language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"baton {__version__}")
        raise typer.Exit


@app.callback()
def _baton(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options of the program itself."""


app.command("serve")(command(ServeOptions, serve))
app.command("generate")(generate)
app.command("chat")(chat)
app.command("status")(status)
app.command("top")(top)
app.command("trace")(trace)
app.command("doctor")(doctor)
bench = typer.Typer(help="Measure one part next to its limit.", no_args_is_help=True)
bench.command("serve")(command(BenchServeOptions, bench_serve))
bench.command("engine")(command(BenchEngineOptions, bench_engine))
bench.command("handoff")(command(BenchHandoffOptions, bench_handoff))
bench.command("store", context_settings=PASS_ON)(bench_store)
bench.command("router", context_settings=PASS_ON)(bench_router)
app.add_typer(bench, name="bench")
app.add_typer(ray, name="ray")
app.add_typer(keys, name="keys")
app.command("sim", context_settings=PASS_ON)(sim)
app.command("plan", context_settings=PASS_ON)(plan)


def main() -> None:
    """Run a command; an expected failure is one line on standard error and exit code 1."""
    try:
        app()
    except BatonError as error:
        sys.exit(f"baton: {error.message}")
    except OSError as error:  # such as a full disk under standard output
        sys.exit(f"baton: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
