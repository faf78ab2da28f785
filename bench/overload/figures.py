"""From what became of requests, and of the conductor meanwhile, to what is published."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.bench.stats import Slo, percentile
from bench.overload.client import Sent

REJECTED = 429


@dataclass(frozen=True, slots=True)
class Look:
    """At the cluster: CPU seconds of the conductor since it began, resident MiB by process."""

    at: float
    cpu_s: float
    rss_mib: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PhaseFigures:
    """Rates per second of the phase; times in seconds. `good`: kept both SLOs."""

    name: str
    seconds: float
    offered_per_s: float
    accepted_per_s: float
    goodput_per_s: float
    statuses: dict[str, int]
    ttft_s: dict[str, float]
    tpot_s: dict[str, float]
    reject_s: dict[str, float]  # from sending to the end of the 429
    conductor_cpu_share: float
    rss_mib: dict[str, tuple[float, float]]  # by process: at its beginning, most


def figures(
    name: str, began: float, seconds: float, sent: Sequence[Sent], tokens: int, slo: Slo,
    looks: Sequence[Look],
) -> PhaseFigures:  # fmt: skip
    answered = [each for each in sent if each.status == 200]
    good = [each for each in answered if _is_good(each, tokens, slo)]
    rejected = [each for each in sent if each.status == REJECTED]
    there = [look for look in looks if began <= look.at <= began + seconds]
    return PhaseFigures(
        name=name,
        seconds=seconds,
        offered_per_s=round(len(sent) / seconds, 2),
        accepted_per_s=round(len(answered) / seconds, 2),
        goodput_per_s=round(len(good) / seconds, 2),
        statuses={str(status): n for status, n in Counter(s.status for s in sent).items()},
        ttft_s=_spread([each.first_s for each in answered]),
        tpot_s=_spread([_tpot(each, tokens) for each in answered]),
        reject_s=_spread([each.end_s for each in rejected]),
        conductor_cpu_share=_share(there),
        rss_mib={
            name: (round(first, 1), round(max(look.rss_mib[name] for look in there), 1))
            for name, first in there[0].rss_mib.items()
        },
    )


def answer_cpu_s(idle: PhaseFigures, quiet: PhaseFigures) -> float:
    """CPU time of the conductor for an answer, in a phase without rejections."""
    spent = quiet.conductor_cpu_share - idle.conductor_cpu_share
    return spent / max(quiet.accepted_per_s, 1e-9)


def rejection_cpu_s(idle: PhaseFigures, quiet: PhaseFigures, busy: PhaseFigures) -> float:
    """CPU time of a rejection, when an answer costs what it does in a phase without any."""
    rejected = busy.offered_per_s - busy.accepted_per_s
    answers = answer_cpu_s(idle, quiet) * busy.accepted_per_s
    spent = busy.conductor_cpu_share - idle.conductor_cpu_share - answers
    return spent / rejected if rejected > 0 else math.nan


def as_markdown(phases: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| phase | offered/s | accepted/s | goodput/s | TTFT p50 / p99, ms | TPOT p50 / p99, ms "
        "| 429 p50 / p99, ms | conductor CPU | RSS begin, most, MiB, of each process |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for phase in phases:
        cells = (
            phase["name"], phase["offered_per_s"], phase["accepted_per_s"],
            phase["goodput_per_s"], _ms(phase["ttft_s"]), _ms(phase["tpot_s"]),
            _ms(phase["reject_s"]), f"{phase['conductor_cpu_share']:.0%}",
            ", ".join(f"{first:.0f} {most:.0f}" for first, most in phase["rss_mib"].values()),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _is_good(sent: Sent, tokens: int, slo: Slo) -> bool:
    ttft, tpot = slo.ttft_s, slo.tpot_s
    return (ttft is None or sent.first_s <= ttft) and (tpot is None or _tpot(sent, tokens) <= tpot)


def _tpot(sent: Sent, tokens: int) -> float:
    return (sent.end_s - sent.first_s) / max(tokens - 1, 1)


def _share(looks: Sequence[Look]) -> float:
    first, last = looks[0], looks[-1]
    return round((last.cpu_s - first.cpu_s) / max(last.at - first.at, 1e-9), 4)


def _spread(samples: Sequence[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {f"p{q}": round(percentile(ordered, q), 5) for q in (50, 99)} if ordered else {}


def _ms(spread: Mapping[str, float]) -> str:
    return " / ".join(f"{value * 1e3:.1f}" for value in spread.values()) or "-"
