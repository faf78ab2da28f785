"""`python -m sim.report`: what a simulation's result says.

RESULT.json -o report.html           one self-contained page
compare A.json B.json [-o FILE]      the figures side by side, and as a page
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

from baton.errors import ConfigError
from sim.fleet.result import read_result
from sim.report import compare
from sim.report.page import comparison, report
from sim.report.view import View

_PROG = "python -m sim.report"


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given[:1] == ["compare"]:
            _compare(_compare_parser().parse_args(given[1:]))
        else:
            _report(_report_parser().parse_args(given))
    except ConfigError as error:
        sys.exit(f"{_PROG}: {error.message}")
    except OSError as error:
        sys.exit(f"{_PROG}: {error.filename}: {error.strerror}")
    return 0


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="HTML file; else beside the result")
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{_PROG} compare", description="Results side by side.")
    parser.add_argument("results", type=Path, nargs="+", help="the others differ from the first")
    parser.add_argument("-o", "--output", type=Path, help="an HTML file, too")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    return parser


def _report(options: argparse.Namespace) -> None:
    result = read_result(options.result)
    name = options.result.name.removesuffix(".gz").removesuffix(".json")
    output = options.output or options.result.with_name(f"{name}.html")
    output.write_text(report(View(result, name)), encoding="utf-8")
    sys.stdout.write(f"{output}\n")


def _compare(options: argparse.Namespace) -> None:
    names = _labels(options.results)
    views = [View(read_result(p), name) for p, name in zip(options.results, names, strict=True)]
    if options.output:
        options.output.write_text(comparison(views), encoding="utf-8")
    if options.json:
        sys.stdout.write(orjson.dumps(compare.as_json(views)).decode() + "\n")
    else:
        _print(views)


def _labels(paths: Sequence[Path]) -> list[str]:
    """File names, or whole paths where these are not different."""
    names = [path.name.removesuffix(".gz").removesuffix(".json") for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _print(views: Sequence[View]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for view in views:
        table.add_column(view.label, justify="right")
        table.add_column("")
    for key, values in compare.differences(views):
        table.add_row(key, *(cell for value in values for cell in (value, "")), style="dim")
    for row in compare.rows(views):
        cells = [row.texts[0], ""]
        for text, change, better in list(zip(row.texts, row.changes, row.better, strict=True))[1:]:
            colour = {True: "green", False: "red", None: "dim"}[better]
            cells += [text, f"[{colour}]{compare.change_text(change)}[/]"]
        table.add_row(row.name, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
