"""What came of a rolling restart: a line per process, and how long requests took."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.chaos.cluster import Leftovers, Shape
from bench.rolling.load import Answered, Kind
from bench.rolling.roll import Restart


@dataclass(frozen=True, slots=True)
class Result:
    """`leaked`: what workers held for nobody when all had been answered."""

    answered: tuple[Answered, ...]
    restarts: tuple[Restart, ...]
    leaked: tuple[str, ...]
    left: Leftovers

    @property
    def good(self) -> bool:
        bad = any(each.problem for each in self.answered) or any(
            restart.exit_code for restart in self.restarts
        )
        return not (bad or self.leaked) and self.left.nothing

    @property
    def undisturbed(self) -> list[Answered]:
        """Those that had ended before the first restart."""
        return [each for each in self.answered if each.ended < self.restarts[0].began]

    def during(self, restart: Restart) -> list[Answered]:
        return [
            each
            for each in self.answered
            if each.began < restart.ended and each.ended > restart.began
        ]


def content(command: str, shape: Shape, result: Result) -> dict[str, Any]:
    return {"command": command, "cluster": asdict(shape), **asdict(result)}


def line(restart: Restart) -> str:
    """For somebody who watches."""
    return (
        f"{restart.name}: ended after {restart.drain_s:.1f} s with {restart.exit_code}, "
        f"ready {restart.start_s:.1f} s later"
    )


def as_markdown(command: str, result: Result) -> str:
    lines = [
        "| restarted | exit code | drained, s | ready after, s | requests meanwhile | failed or "
        "wrong | seconds of a short one, p50 / max | of a long one |",
        "| --- " + "| ---: " * 7 + "|",
        _row("nobody yet", "", "", "", result.undisturbed),
    ]
    for each in result.restarts:
        drained, ready = f"{each.drain_s:.1f}", f"{each.start_s:.1f}"
        lines.append(_row(each.name, str(each.exit_code), drained, ready, result.during(each)))
    lines.append(_row("all", "", "", "", result.answered))
    counts = ", ".join(
        f"{sum(each.kind is kind for each in result.answered)} by {kind}" for kind in Kind
    )
    left = {name: value for name, value in asdict(result.left).items() if value}
    codes = {name: code for name, code in left.pop("exit_codes", {}).items() if code}
    problems = [
        f"- {each.kind}, {each.question}: {each.problem}"
        for each in result.answered
        if each.problem
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"`{command}`: {len(result.answered)} requests ({counts}), {len(problems)} failed or "
            f"wrong; blocks leaked: {list(result.leaked) or 'none'}; left after the end: "
            f"{left or 'nothing'}; exit codes other than 0 at the end: "
            f"{codes or 'none'}.",
            *problems,
        ]
    )


def _row(name: str, code: str, drained: str, ready: str, answered: Sequence[Answered]) -> str:
    bad = sum(bool(each.problem) for each in answered)
    long = [each.seconds for each in answered if each.question.startswith("marked")]
    short = [each.seconds for each in answered if not each.question.startswith("marked")]
    cells = (name, code, drained, ready, len(answered), bad, _spread(short), _spread(long))
    return "| " + " | ".join(map(str, cells)) + " |"


def _spread(seconds: Iterable[float]) -> str:
    known = list(seconds)
    return f"{statistics.median(known):.1f} / {max(known):.1f}" if known else "–"
