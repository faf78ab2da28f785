"""The result of a soak as JSON and as Markdown."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baton.bench.stats import percentile
from bench.chaos.cluster import Leftovers
from bench.soak.kills import Kill
from bench.soak.load import Load
from bench.soak.watch import Sample, Watch, lives

_ERROR = re.compile(
    r" (ERROR|CRITICAL) |^Traceback|Fatal Python error|ResourceWarning", re.MULTILINE
)


def errors_in(logs: Path) -> dict[str, int]:
    """Lines that tell of an error, per process."""
    counts = {
        path.stem: len(_ERROR.findall(path.read_text(errors="replace")))
        for path in sorted(logs.glob("*.log"))
    }
    return {name: count for name, count in counts.items() if count}


def result(
    load: Load, kills: Sequence[Kill], watch: Watch, left: Leftovers, busy: Mapping[str, Any]
) -> dict[str, Any]:
    """`busy`: blocks that were in use, by member, when all was over."""
    tally = load.tally
    return {
        "requests": dict(tally.outcomes),
        "requests_by_kind": dict(sorted(tally.ended.items())),
        "asked_again": load.asked_again,
        "output_tokens": tally.tokens,
        "latency_s": {
            f"p{q}": round(percentile(sorted(tally.latencies_s), q), 2) for q in (50, 90, 99)
        }
        if tally.latencies_s
        else {},
        "noted": tally.noted,
        "kills": [asdict(kill) for kill in kills],
        "lives": [asdict(life) for life in lives(watch.samples)],
        "segments": watch.segments,
        "blocks_in_use_at_the_end": dict(busy),
        "left": asdict(left),
        "samples": {name: _columns(samples) for name, samples in watch.samples.items()},
    }


def _columns(samples: Sequence[Sample]) -> dict[str, list[float]]:
    return {
        name: [getattr(sample, name) for sample in samples] for name in Sample.__dataclass_fields__
    }


def as_markdown(told: Mapping[str, Any]) -> str:
    kills: Sequence[Mapping[str, Any]] = told["kills"]
    killed = Counter(name for kill in kills for name in kill["names"])
    back = [kill["back_s"] for kill in kills]
    left = told["left"]
    segments = [count for _, count in told["segments"]]
    rows = [
        ("requests", ", ".join(f"{count} {what}" for what, count in told["requests"].items())),
        ("whole answers asked for again", told["asked_again"]),
        ("output tokens", told["output_tokens"]),
        ("latency p50 / p90 / p99, s", " / ".join(map(str, told["latency_s"].values()))),
        (
            "kills",
            f"{sum(killed.values())} in {len(kills)} strikes: "
            + ", ".join(f"{name} {count}" for name, count in sorted(killed.items())),
        ),
        (
            "everybody live again, p50 / max, s",
            f"{statistics.median(back):.1f} / {max(back):.1f}" if back else "-",
        ),
        ("blocks in use at the end", told["blocks_in_use_at_the_end"] or "none"),
        (
            "segments of shared memory: first, most, after the end",
            f"{segments[0]}, {max(segments)}, {len(left['segments'])}",
        ),
        ("processes, files left", f"{len(left['processes'])}, {len(left['files'])}"),
        ("exit codes at SIGTERM", sorted(set(left["exit_codes"].values()))),
        ("lines of errors in logs", told["log_errors"] or "none"),
    ]
    lines = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows), ""]
    return "\n".join([*lines, *_lives_table(told["lives"])])


def _lives_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| process | lives | longest, min | RSS settled, end, MiB | PSS slope, MiB/h "
        "| anonymous slope, MiB/h | threads' malloc arenas, MiB | descriptors | threads | CPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(life["name"] for life in found):
        own = [life for life in found if life["name"] == name]
        longest = max(own, key=lambda life: life["seconds"])
        cells = (
            name, len(own), f"{longest['seconds'] / 60:.1f}",
            _pair(longest["rss_mib"]), _or_dash(longest["pss_slope"]),
            _or_dash(longest["anonymous_slope"]), _pair(longest["arenas_mib"]),
            _pair(longest["fds"]), _pair(longest["threads"]), f"{longest['cpu_share']:.0%}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _pair(values: Sequence[Any]) -> str:
    return " → ".join(map(str, values))


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"
