"""Parts of the page that every kind of section has."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from sim.results.runs import Outcome, Replay, Run

NOT_RUN = "not run yet"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column has names, the others figures."""
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)]), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def size(replay: Replay, kept: Sequence[Outcome], wanted: int, sources: str) -> str:
    """How much was simulated, what it cost, and what ran it."""
    trace = "each trace" if replay.make else "the trace"
    share = f"All of {trace}"
    if replay.first is not None:
        share = f"The first {replay.first:,} requests of {trace}"
    cpu_s, wall_s = (sum(getattr(o, name) for o in kept) for name in ("cpu_s", "wall_s"))
    return (
        f"{share}; {len(kept)} of {wanted} runs, {cpu_s:,.0f} s of CPU time "
        f"({wall_s:,.0f} s of wall time); sources `{sources}`.\n"
    )


def commands(runs: Iterable[Run]) -> str:
    return "\n".join(["```", *(run.command() for run in runs), "```\n"])
