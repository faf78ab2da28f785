"""What `baton bench engine` found, as JSON and as tables. No torch, no terminal library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baton.bench.engine import Report
from baton.bench.engine_ceilings import Ceilings
from baton.bench.engine_loop import LoopTiming
from baton.bench.engine_phases import Figure, Measured
from baton.bench.engine_profile import Profile
from baton.bench.engine_rate import Rate


@dataclass(frozen=True, slots=True)
class Table:
    """The first column is text, the others are figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def as_json(report: Report) -> dict[str, Any]:
    """The schema is in docs/cli.md. Seconds, bytes and FLOP/s throughout."""
    ceilings = report.ceilings
    return {
        "benchmark": "engine",
        "options": asdict(report.options),
        "model": report.model,
        "device": report.device,
        "dtype": report.dtype,
        "weight_bytes": report.weight_bytes,
        "kv_token_bytes": report.kv_token_bytes,
        "ceilings": {
            "matrix_per_s": ceilings.matrix_per_s,
            "copy_per_s": ceilings.copy_per_s,
            "before": asdict(report.before),
            "after": asdict(report.after),
        },
        "warnings": list(report.warnings),
        "prefill": [_figure(figure, ceilings) for figure in report.prefills],
        "decode": [_figure(figure, ceilings) for figure in report.decodes],
        "mixed": [_figure(figure, ceilings) for figure in report.mixed],
        "kernels": [_figure(figure, ceilings) for figure in report.kernels],
        "loop": [{**asdict(loop), "share": loop.share} for loop in report.loops],
        "profile": [asdict(profile) for profile in report.profiles],
    }


def _figure(figure: Figure, ceilings: Ceilings) -> dict[str, Any]:
    if not isinstance(figure, Measured):
        return {"name": figure.name, "skipped": figure.reason}
    seconds, bound = figure.timing.median_s, ceilings.bound(figure.work)
    return {
        "name": figure.name,
        "tokens": figure.tokens,
        **asdict(figure.timing),
        "tokens_per_s": figure.tokens / seconds,
        **asdict(figure.work),
        "flops_per_s": figure.work.flops / seconds,
        "bound_by": bound.by,
        "bound_s": bound.seconds,
        "share": bound.seconds / seconds,
        "memory_share": ceilings.memory_s(figure.work) / seconds,
    }


def tables(report: Report) -> Iterator[Table]:
    """Everything that was measured, for people."""
    ceilings = report.ceilings
    yield _ceilings(report)
    if report.prefills:
        yield Table(
            "Prefill",
            ("", "time", "±", "tokens/s", "FLOP/s", "of the matrix ceiling"),
            tuple(_prefill(figure, ceilings) for figure in report.prefills),
        )
    if report.decodes:
        yield Table(
            "Decode",
            ("", "step", "±", "tokens/s", "of the memory roofline", "bound by", "of that bound"),
            tuple(_decode(figure, ceilings) for figure in report.decodes),
        )
    if report.mixed:
        yield Table(
            "Decodes with a chunk of a prompt",
            ("", "step", "±", "tokens/s", "FLOP/s", "of the matrix ceiling"),
            tuple(_prefill(figure, ceilings) for figure in report.mixed),
        )
    if report.loops:
        yield Table(
            "Between the steps of an engine",
            ("sequences", "step", "gap", "of the step"),
            tuple(_loop(loop) for loop in report.loops),
        )
    if report.kernels:
        yield Table(
            "Kernels",
            ("", "time", "±", "bound by", "of that bound"),
            tuple(_kernel(figure, ceilings) for figure in report.kernels),
        )
    yield from map(_profile, report.profiles)


def markdown(table: Table) -> str:
    """A table for a file or a plain terminal."""
    lines = [table.header, ("---",) * len(table.header), *table.rows]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"## {table.title}\n\n{body}\n"


def _ceilings(report: Report) -> Table:
    before, after = report.before, report.after
    rows = [
        *_rates(before.products, after.products, "FLOP/s"),
        *_rates(before.reads, after.reads, "B/s"),
        *_rates(before.copies, after.copies, "B/s"),
    ]
    title = f"Ceilings of {report.device}, {report.dtype}"
    return Table(title, ("", "before", "after", ""), tuple(rows))


def _rates(before: Sequence[Rate], after: Sequence[Rate], unit: str) -> Iterator[tuple[str, ...]]:
    for one, two in zip(before, after, strict=True):
        note = "" if one.counts else "for information"
        yield one.name, rate_text(one.per_s, unit), rate_text(two.per_s, unit), note


def _prefill(figure: Figure, ceilings: Ceilings) -> tuple[str, ...]:
    if not isinstance(figure, Measured):
        return _skipped(figure.name, figure.reason, 4)
    seconds = figure.timing.median_s
    rate = figure.work.flops / seconds
    return (
        figure.name,
        *_timing(figure),
        f"{figure.tokens / seconds:,.0f}",
        rate_text(rate, "FLOP/s"),
        share_text(rate / ceilings.matrix_per_s),
    )


def _decode(figure: Figure, ceilings: Ceilings) -> tuple[str, ...]:
    if not isinstance(figure, Measured):
        return _skipped(figure.name, figure.reason, 5)
    seconds, bound = figure.timing.median_s, ceilings.bound(figure.work)
    return (
        figure.name,
        *_timing(figure),
        f"{figure.tokens / seconds:,.0f}",
        share_text(ceilings.memory_s(figure.work) / seconds),
        bound.by,
        share_text(bound.seconds / seconds),
    )


def _kernel(figure: Figure, ceilings: Ceilings) -> tuple[str, ...]:
    if not isinstance(figure, Measured):
        return _skipped(figure.name, figure.reason, 3)
    bound = ceilings.bound(figure.work)
    share = share_text(bound.seconds / figure.timing.median_s)
    return figure.name, *_timing(figure), bound.by, share


def _loop(loop: LoopTiming) -> tuple[str, ...]:
    return (
        str(loop.sequences),
        time_text(loop.step_s),
        time_text(loop.gap_s),
        share_text(loop.share),
    )


def _profile(profile: Profile) -> Table:
    busy = share_text(profile.busy_s / profile.step_s)
    return Table(
        f"Profile of a {profile.name}: {time_text(profile.step_s)}, busy {busy}",
        ("", "calls", "time", "of the step"),
        tuple(
            (x.name, f"{x.calls:g}", time_text(x.seconds), share_text(x.seconds / profile.step_s))
            for x in profile.lines
        ),
    )


def _skipped(name: str, reason: str, empty: int) -> tuple[str, ...]:
    return name, f"skipped: {reason}", *("",) * empty


def _timing(figure: Measured) -> tuple[str, str]:
    return time_text(figure.timing.median_s), share_text(figure.timing.spread)


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def rate_text(per_s: float, unit: str) -> str:
    prefix, scale = ("T", 1e12) if per_s >= 1e12 else ("G", 1e9)
    return f"{per_s / scale:.3g} {prefix}{unit}"


def share_text(share: float) -> str:
    return f"{share:.1%}"
