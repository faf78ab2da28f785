"""The figures of a report: each draws one or several results, and says how it is to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.report.scales import Format, Scale, clock, linear, logarithmic, number, percent, seconds
from sim.report.svg import Floats, Mark, Series, heat, lines
from sim.report.view import View, link_bytes, link_rates

_QUANTILES = np.concatenate((np.linspace(0, 0.98, 197), np.linspace(0.981, 1, 20)))


@dataclass(frozen=True, slots=True)
class Figure:
    """`how`: how to read it; `rows`: its numbers, the first row are the columns' names."""

    title: str
    how: str
    plot: str
    rows: Sequence[Sequence[str]] = ()


def ttft(views: Sequence[View]) -> Figure:
    marks = [Mark(views[0].ttft_slo_s, "SLO")] if np.isfinite(views[0].ttft_slo_s) else []
    samples = [(view.label, view.of_answered("ttft_s")) for view in views]
    return _cdf(
        "Time to first token (TTFT)",
        "How much of all answers had begun after so long. The further left the line, the better; "
        "the time axis is logarithmic.",
        samples,
        marks,
        "time to first token",
    )


def tbt(views: Sequence[View]) -> Figure:
    marks = [Mark(views[0].tbt_slo_s, "SLO")] if np.isfinite(views[0].tbt_slo_s) else []
    if len(views) > 1:
        samples = [(view.label, view.of_answered("tbt_p90_s")) for view in views]
        how = "For each answer, the gap that nine in ten of its gaps between tokens are within."
    else:
        kinds = (("mean (TPOT)", "mean"), ("nine in ten gaps", "p90"), ("99 in 100 gaps", "p99"))
        samples = [(name, views[0].of_answered(f"tbt_{kind}_s")) for name, kind in kinds]
        how = (
            "Gaps between an answer's tokens: the mean of each answer, and the lengths that nine "
            "in ten and 99 in 100 of its gaps are within."
        )
    return _cdf("Time between tokens (TBT)", how, samples, marks, "gap between tokens")


def _cdf(
    title: str,
    how: str,
    samples: Sequence[tuple[str, Floats]],
    marks: Sequence[Mark],
    label: str,
    format: Format = seconds,
) -> Figure:
    drawn = [(name, np.quantile(values, _QUANTILES)) for name, values in samples if len(values)]
    if not drawn:
        return _nothing(title, "No request was answered.")
    ends = [mark.at for mark in marks] + [float(values[-1]) for _, values in drawn]
    low = min(float(values[1]) for _, values in drawn)
    x = logarithmic(low, max(ends), label, format)
    y = Scale(0.0, 1.0, "share of answers", format=percent)
    series = [Series(name, values, _QUANTILES) for name, values in drawn]
    table: list[Sequence[str]] = [("", "mean", "p50", "p90", "p99", "max")]
    for name, values in samples:
        if len(values):
            p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
            figures = (float(values.mean()), p50, p90, p99, float(values.max()))
            table.append((name, *map(format, figures)))
    says = "; ".join(f"{row[0]}: median {row[2]}, 90% within {row[3]}" for row in table[1:])
    return Figure(title, how, lines(title, says, series, x, y, marks), table)


def goodput(views: Sequence[View]) -> Figure:
    """Requests per second over the time of arrival."""
    if len(views) > 1:
        series = [(view.label, view, view.good) for view in views]
    else:
        view = views[0]
        everything = np.ones(len(view.good), dtype=bool)
        series = [
            ("asked", view, everything),
            ("answered", view, view.answered),
            ("answered within both SLOs", view, view.good),
        ]
    return _over_time(
        "Goodput over time",
        "Requests per second, by the time at which they were asked. What is between the lines was "
        "answered too late, or not at all.",
        [(name, v.bin_middles_s, v.binned(mask) / v.width_s) for name, v, mask in series],
        "requests per second",
    )


def hits(views: Sequence[View]) -> Figure:
    series = []
    for view in views:
        records = view.result.records
        cached = view.binned(records.column("cached_tokens") * view.answered)
        prompt = view.binned(records.column("prompt_tokens") * view.answered)
        share = np.divide(cached, prompt, out=np.full(cached.shape, np.nan), where=prompt > 0)
        series.append((view.label, view.bin_middles_s, share))
    return _over_time(
        "Prefix cache hits over time",
        "Share of the prompt tokens that were not computed, because their KV was in a cache; of "
        "answered requests, by the time at which they were asked.",
        series,
        "share of prompt tokens",
        percent,
    )


def waits(view: View) -> Figure:
    """What the time to the first token is made of."""
    records = view.result.records
    series = []
    for name, column in (("waited", "queue_s"), ("KV came", "fetch_s"), ("computed", "prefill_s")):
        of_each = records.column(column)
        known = ~np.isnan(of_each)
        counts = view.binned(known)
        sums = view.binned(np.where(known, of_each, 0.0))
        mean = np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
        series.append((name, view.bin_middles_s, mean))
    return _over_time(
        "Where the time to the first token went",
        "For a prompt, on average: how long it waited at its worker, how long KV that is not there "
        "took to come, and how long it was computed; by the time at which it was asked.",
        series,
        "seconds of a prompt",
        seconds,
    )


def queues(views: Sequence[View]) -> Figure:
    return _over_time(
        "Queues over time",
        "Requests that waited at all workers of a role together. A line that keeps climbing means "
        "that these workers are too few.",
        _by_role(views, "queue"),
        "requests that wait",
    )


def running(views: Sequence[View]) -> Figure:
    return _over_time(
        "Requests under way",
        "Requests that were being computed at all workers of a role together.",
        _by_role(views, "running"),
        "requests at once",
    )


def _by_role(views: Sequence[View], column: str) -> list[tuple[str, Floats, Floats]]:
    return [
        (_named(view, role, views), samples.times_s, samples.of_role(column, role))
        for view in views
        for samples in (view.worker_samples,)
        for role in samples.roles()
    ]


def _named(view: View, name: str, views: Sequence[View]) -> str:
    return name if len(views) == 1 else f"{view.label}: {name}"


def transfers(views: Sequence[View]) -> Figure:
    series = [
        (_named(view, kind, views), times, rate)
        for view in views
        for times, rates in (link_rates(view.result),)
        for kind, rate in rates.items()
    ]
    figure = _over_time(
        "Transfers over links",
        "Bytes per second over all links of a kind: the network (NIC) out of the nodes and into "
        "them, and between CPU memory and GPUs.",
        series,
        "bytes per second",
    )
    busiest = [
        (_named(view, name, views), f"{number(count)}B")
        for view in views
        for name, count in link_bytes(view.result)[:10]
    ]
    rows = [("busiest links", "bytes in all"), *busiest] if busiest else ()
    return Figure(figure.title, figure.how, figure.plot, rows)


def load(view: View) -> Figure:
    return _heat(
        "Load of each worker",
        "One row for each worker, from left to right in time: the stronger the colour, the more of "
        "the time it computed. Rows that are alike are a balanced fleet.",
        view,
        view.worker_samples.busy(),
        "busy",
    )


def kv(view: View) -> Figure:
    return _heat(
        "KV memory of each worker",
        "One row for each worker: the stronger the colour, the more of its KV blocks were in use.",
        view,
        view.worker_samples.kv(),
        "in use",
    )


def _heat(title: str, how: str, view: View, shares: Floats, word: str) -> Figure:
    samples = view.worker_samples
    if not len(samples):
        return _nothing(title, "There are no samples of workers.")
    means = np.nanmean(shares, axis=1)
    low, mean, high = (f"{share:.0%}" for share in (means.min(), means.mean(), means.max()))
    says = f"{len(samples.names)} workers; mean {mean} {word}, least {low}, most {high}."
    rows = [("worker", f"mean share {word}")]
    rows += [(name, f"{mean:.1%}") for name, mean in zip(samples.names, means, strict=True)]
    plot = heat(title, says, samples.names, shares, clock(float(samples.times_s[-1])))
    return Figure(title, how, plot, rows[:65])


def predictions(views: Sequence[View]) -> Figure:
    """Not of requests that were never routed."""
    samples = []
    for view in views:
        predicted = view.result.records.column("predicted_ttft_s")[view.answered]
        seen = view.result.records.column("ttft_s")[view.answered]
        usable = (predicted > 0) & (seen > 0)
        samples.append((view.label, seen[usable] / predicted[usable]))
    return _cdf(
        "What the router predicted",
        "The TTFT that came, divided by the one that the conductor predicted when it routed the "
        "request: 1 is a right prediction, more is a late answer.",
        samples,
        [Mark(1.0, "right")],
        "TTFT / predicted TTFT",
        number,
    )


def _over_time(
    title: str,
    how: str,
    series: Sequence[tuple[str, Floats, Floats]],
    label: str,
    format: Format = number,
) -> Figure:
    drawn = [(name, at, ys) for name, at, ys in series if len(at) and not np.isnan(ys).all()]
    if not drawn:
        return _nothing(title, "There is nothing to show.")
    x = clock(max(float(at[-1]) for _, at, _ in drawn))
    y = linear(max(float(np.nanmax(ys)) for _, _, ys in drawn), label, format)
    table = [("", "mean", "most")]
    for name, _, ys in drawn:
        table.append((name, format(float(np.nanmean(ys))), format(float(np.nanmax(ys)))))
    says = "; ".join(f"{row[0]}: mean {row[1]}, at most {row[2]}" for row in table[1:])
    plot = lines(title, f"{label}: {says}", [Series(*one) for one in drawn], x, y)
    return Figure(title, how, plot, table)


def _nothing(title: str, why: str) -> Figure:
    return Figure(title, why, "")
