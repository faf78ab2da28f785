"""What clients saw, side by side with what was predicted. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from baton.bench.stats import Outcome, percentile
from baton.client.timing import Timing

FIGURES = ("mean TTFT", "p90 TTFT", "mean TPOT", "p90 TPOT")


@dataclass(frozen=True, slots=True)
class Seen:
    """By the clients of one run, in the order of arrival. Seconds; an answer of one token has no
    time per output token."""

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float | None, ...]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Seen:
        """Raises SystemExit for a run in which a request failed."""
        found = timings(outcomes)
        return cls(
            tuple(timing.ttft_s for timing in found), tuple(timing.tpot_s for timing in found)
        )

    def figures(self) -> dict[str, float]:
        """Those of FIGURES, in seconds."""
        tpots = [tpot for tpot in self.tpot_s if tpot is not None]
        values = (*_mean_and_p90(self.ttft_s), *_mean_and_p90(tpots))
        return dict(zip(FIGURES, values, strict=True))

    def as_json(self) -> dict[str, object]:
        return {
            "ttft_s": [round(ttft, 6) for ttft in self.ttft_s],
            "tpot_s": [tpot and round(tpot, 6) for tpot in self.tpot_s],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[float]]) -> Seen:
        return cls(tuple(data["ttft_s"]), tuple(data["tpot_s"]))


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of one cluster, in seconds: measured in each repetition, and predicted."""

    cluster: str
    figure: str
    measured: tuple[float, ...]
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to the mean of what was measured."""
        return self.predicted / self.mean - 1

    @property
    def noise(self) -> float:
        """How far the repetitions are from each other, relative to their mean."""
        return (max(self.measured) - min(self.measured)) / self.mean

    @property
    def mean(self) -> float:
        return math.fsum(self.measured) / len(self.measured)


def timings(outcomes: Sequence[Outcome]) -> list[Timing]:
    """Raises SystemExit when a request failed."""
    found = [outcome.timing for outcome in outcomes if outcome.timing is not None]
    if len(found) < len(outcomes):
        error = next(outcome.error for outcome in outcomes if outcome.error is not None)
        raise SystemExit(f"{len(outcomes) - len(found)} requests failed: {error}")
    return found


def rows(cluster: str, measured: Sequence[Seen], predicted: Seen) -> Iterator[Row]:
    for figure in FIGURES:
        values = tuple(seen.figures()[figure] for seen in measured)
        yield Row(cluster, figure, values, predicted.figures()[figure])


def as_markdown(table: Sequence[Row]) -> str:
    count = max(len(row.measured) for row in table)
    runs = " | ".join(f"run {n + 1}" for n in range(count))
    lines = [
        f"| cluster | ms | {runs} | runs apart | predicted | error |",
        "| --- | --- |" + " ---: |" * (count + 3),
    ]
    for row in table:
        measured = " | ".join(f"{seconds * 1e3:.1f}" for seconds in row.measured)
        lines.append(
            f"| {row.cluster} | {row.figure} | {measured} | {row.noise:.1%} "
            f"| {row.predicted * 1e3:.1f} | {row.error:+.1%} |"
        )
    return "\n".join(lines)


def _mean_and_p90(samples: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(samples)
    return math.fsum(ordered) / len(ordered), percentile(ordered, 90)
