"""From a result's JSON to tables: medians, spread, ratios against the reference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Runs = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one figure over the rounds. `ratio`: median of the ratios to the reference in the same
    round, so that what the machine did meanwhile cancels out; None without a reference."""

    median: float
    low: float
    high: float
    rounds: int
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Column:
    """`scale` goes from the unit of the JSON to that of the title."""

    key: str
    title: str
    scale: float = 1.0
    digits: int = 1
    spread: bool = False
    ratio: bool = False


COLUMNS = (
    Column("output_tokens_per_s", "tokens/s", digits=0, spread=True, ratio=True),
    Column("ttft_p50_s", "TTFT p50 ms", 1e3, ratio=True),
    Column("ttft_p99_s", "TTFT p99 ms", 1e3),
    Column("tpot_p50_s", "TPOT p50 ms", 1e3, 2, ratio=True),
    Column("itl_p99_s", "ITL p99 ms", 1e3),
    Column("long_ttft_s", "long TTFT ms", 1e3, 0, spread=True, ratio=True),
    Column("itl_before_p50_s", "ITL before p50 ms", 1e3),
    Column("itl_before_p99_s", "p99", 1e3),
    Column("itl_during_p50_s", "ITL during p50 ms", 1e3, ratio=True),
    Column("itl_during_p99_s", "p99", 1e3, ratio=True),
    Column("tokens_per_s_before", "tokens/s before", digits=0),
    Column("tokens_per_s_during", "during", digits=0, ratio=True),
    Column("output_tokens_per_s_at_8", "tokens/s at 8", digits=0),
    Column("output_tokens_per_s_at_16", "at 16", digits=0),
    Column("output_tokens_per_s_at_32", "at 32", digits=0),
    Column("rate_per_s", "offered req/s", digits=2),
    Column("server_cpu_s", "CPU s", digits=1),
    Column("client_us_per_token", "client µs/token", digits=0),
    Column("others_cpu_share", "others %", 100.0, 0),
)


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def spread_of(runs: Runs, key: str, reference: Runs) -> Spread | None:
    """Over the rounds without failures that have the figure; None when there are none."""
    own = _by_round(runs, key)
    if not own:
        return None
    base = _by_round(reference, key)
    ratios = [own[r] / base[r] for r in own if base.get(r)]
    values = list(own.values())
    return Spread(
        statistics.median(values),
        min(values),
        max(values),
        len(values),
        statistics.median(ratios) if ratios else None,
    )


def _by_round(runs: Runs, key: str) -> dict[int, float]:
    return {
        run["round"]: run["figures"][key]
        for run in runs
        if key in run["figures"] and not run["figures"].get("failed")
    }


def without_noise(runs: Runs, limit: float | None) -> tuple[Runs, int]:
    """Runs of rounds in which others used at most `limit` of the cores next to every system, and
    how many rounds had more. All rounds when none was quiet."""
    noisy = {
        run["round"]
        for run in runs
        if limit is not None and run["figures"].get("others_cpu_share", 0.0) > limit
    }
    quiet = [run for run in runs if run["round"] not in noisy]
    return (quiet, len(noisy)) if quiet else (runs, 0)


def tables(result: dict[str, Any]) -> list[Table]:
    """One per model and workload, then one per model of what systems cost without load."""
    reference = result["reference"]
    made = []
    for model, systems in result["systems"].items():
        for workload, describe in result["workloads"].items():
            runs = [
                run
                for run in result["runs"]
                if run["model"] == model and run["workload"] == workload
            ]
            if runs:
                quiet, noisy = without_noise(runs, result["noise_limit"])
                table = _load_table(f"{model}: {workload}", describe, quiet, reference, systems)
                if noisy:
                    table = replace(table, notes=(*table.notes, f"{noisy} noisy rounds left out"))
                made.append(table)
        made.append(_cost_table(model, systems))
    return made


def _load_table(
    title: str, describe: str, runs: Runs, reference: str, order: Iterable[str]
) -> Table:
    ran = {run["system"] for run in runs}
    names = [name for name in order if name in ran]
    by_name = {name: [run for run in runs if run["system"] == name] for name in names}
    columns = [c for c in COLUMNS if any(c.key in run["figures"] for run in runs)]
    rows = []
    for name in names:
        cells = [name]
        for column in columns:
            base = by_name.get(reference, []) if name != reference else []
            cells.append(cell(spread_of(by_name[name], column.key, base), column))
        failed = sum(run["figures"].get("failed", 0) for run in by_name[name])
        rows.append((*cells, f"{failed:.0f}"))
    header = ("system", *(column.title for column in columns), "failed")
    return Table(f"{title} ({describe})", header, tuple(rows), tuple(_errors(runs)))


def cell(spread: Spread | None, column: Column) -> str:
    """`median [low-high] ratio×`, as far as the column asks for it."""
    if spread is None:
        return "-"

    def number(value: float) -> str:
        return f"{value * column.scale:,.{column.digits}f}"

    text = number(spread.median)
    if column.spread and spread.rounds > 1:
        text += f" [{number(spread.low)}–{number(spread.high)}]"
    if column.ratio and spread.ratio is not None:
        text += f" ({spread.ratio:.2f}×)"
    return text


def _errors(runs: Runs) -> Iterable[str]:
    counts: dict[tuple[str, str], int] = {}
    for run in runs:
        for message, count in run["errors"]:
            key = (run["system"], message.splitlines()[0][:160])
            counts[key] = counts.get(key, 0) + count
    for (system, message), count in counts.items():
        yield f"{system}: {count} × {message}"


def _cost_table(model: str, systems: dict[str, dict[str, Any]]) -> Table:
    rows, notes = [], []
    for name, system in systems.items():
        if "failed" in system:
            notes.append(f"{name}: {system['failed'].splitlines()[0]}")
        if "ready_s" not in system:
            continue
        saturation = system.get("saturation_requests_per_s")
        rows.append(
            (
                name,
                f"{system['ready_s']:.1f}",
                f"{system['memory_bytes'] / 2**30:.2f}",
                f"{system['idle_cpu_share']:.1%}",
                "-" if saturation is None else f"{saturation:.2f}",
                str(system.get("restarts", 0)),
            )
        )
    header = ("system", "ready s", "memory GiB", "idle, of a core", "trace req/s", "restarts")
    return Table(f"{model}: without load", header, tuple(rows), tuple(notes))


def as_text(table: Table) -> str:
    """For a terminal: columns aligned, figures to the right."""
    grid = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in grid) for i in range(len(table.header))]
    lines = [table.title]
    for row in grid:
        cells = [row[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells))
    return "\n".join([*lines, *(f"  {note}" for note in table.notes)])


def as_markdown(table: Table) -> str:
    rule = ("---", *("---:" for _ in table.header[1:]))
    lines = ["| " + " | ".join(row) + " |" for row in (table.header, rule, *table.rows)]
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([f"### {table.title}", "", *lines, *([""] if notes else []), *notes])


def document(results: Sequence[dict[str, Any]], render: Callable[[Table], str]) -> str:
    """All results, each under what it was measured on and with."""
    parts = []
    for result in results:
        parts.append(heading(result))
        parts += [render(table) for table in tables(result)]
    return "\n\n".join(parts) + "\n"


def heading(result: dict[str, Any]) -> str:
    """Where, when and how it was measured."""
    machine = result["machine"]
    gpus = "".join(f", {gpu}" for gpu in machine["gpus"])
    flags = ", ".join(machine["flags"])
    quick = " (quick: smaller loads, no results)" if result["setting"]["quick"] else ""
    return (
        f"{machine['processor']}, {len(machine['cpus'])} of {machine['cpus_of_machine']} CPUs "
        f"({flags}), {machine['memory_gib']} GiB{gpus}; {result['time']}, revision "
        f"{result['revision']}, {result['rounds']} rounds{quick}. Medians [lowest–highest] and, in "
        f"parentheses, medians of the rounds' ratios to {result['reference']}.\n\n"
        f"Command: `{result['command']}`"
    )
