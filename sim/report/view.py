"""A result as a report needs it: per request, per bin of time, per worker."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sim.fleet.records import OK
from sim.fleet.result import Result
from sim.fleet.totals import TBT, good

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_MOST_BINS = 60  # of requests, in time
_MOST_TIMES = 120  # of samples


@dataclass(frozen=True)
class View:
    """`label` tells it from other results on the same page."""

    result: Result
    label: str

    @property
    def ttft_slo_s(self) -> float:
        return float(self.result.spec.get("slo_ttft_s", np.inf))

    @property
    def tbt_slo_s(self) -> float:
        return float(self.result.spec.get("slo_tbt_s", np.inf))

    @cached_property
    def answered(self) -> Bools:
        return self.result.records.where("code", OK)

    @cached_property
    def good(self) -> Bools:
        return good(self.result.records, self.ttft_slo_s, self.tbt_slo_s)

    def of_answered(self, column: str) -> Floats:
        """Without those that have no such value."""
        values: Floats = self.result.records.column(column)[self.answered].astype(np.float64)
        return values[~np.isnan(values)]

    @property
    def ttft_share(self) -> float:
        """Of all requests, those whose first token came in time."""
        return self._share(
            self.answered & (self.result.records.column("ttft_s") <= self.ttft_slo_s)
        )

    @property
    def tbt_share(self) -> float:
        """Of all requests, those that were answered without too many long gaps."""
        return self._share(self.answered & ~(self.result.records.column(TBT) > self.tbt_slo_s))

    def outcomes(self) -> list[tuple[str, int]]:
        """What became of all requests: counts that add up, the good ones first."""
        records = self.result.records
        late = self.answered & ~(records.column("ttft_s") <= self.ttft_slo_s)
        slow = self.answered & (records.column(TBT) > self.tbt_slo_s)
        found = [
            ("within both SLOs", self.good),
            ("first token late", late & ~slow),
            ("gaps too long", slow & ~late),
            ("first token late and gaps too long", late & slow),
        ]
        codes = [code for code in records.texts("code") if code != OK]
        found += [(f"not answered: {code}", records.where("code", code)) for code in sorted(codes)]
        counts = [(name, int(mask.sum())) for name, mask in found]
        return [pair for pair in counts if pair[1] or pair == counts[0]]

    def _share(self, wanted: Bools) -> float:
        return float(wanted.mean()) if len(wanted) else 0.0

    @cached_property
    def _count(self) -> int:
        """Of bins of time: with twenty requests each, where there are so many."""
        return min(_MOST_BINS, max(1, len(self.result.records) // 20))

    @cached_property
    def width_s(self) -> float:
        """Of a bin: they end with the last arrival, so that none is cut short."""
        last = float(self.result.records.column("at_s").max(initial=0.0))
        return last / self._count or 1.0

    @cached_property
    def _bins(self) -> npt.NDArray[np.int64]:
        numbers = (self.result.records.column("at_s") / self.width_s).astype(np.int64)
        return np.minimum(numbers, self._count - 1)

    @property
    def bin_middles_s(self) -> Floats:
        return (np.arange(self._count, dtype=np.float64) + 0.5) * self.width_s

    def binned(self, weights: npt.NDArray[Any]) -> Floats:
        """Sums over the requests that arrived in each bin."""
        return np.bincount(self._bins, weights=weights, minlength=self._count).astype(np.float64)

    @cached_property
    def worker_samples(self) -> WorkerSamples:
        return WorkerSamples(self.result)


class WorkerSamples:
    """Samples of all workers at `times_s`; grids are `[workers, times]`, NaN where a worker was not
    there. Many moments are joined to their mean."""

    def __init__(self, result: Result) -> None:
        table = self._table = result.workers
        moments, self._moment = np.unique(table.column("at_s"), return_inverse=True)
        names = table.texts("worker")
        order = sorted(range(len(names)), key=lambda number: _natural(names[number]))
        self.names: Sequence[str] = [names[number] for number in order]
        place = np.empty(len(names), dtype=np.int64)
        place[order] = np.arange(len(names))
        self._worker = place[table.column("worker")]
        self._lengths = np.diff(moments, prepend=0.0)
        self._parts = np.array_split(
            np.arange(len(moments)), min(_MOST_TIMES, max(1, len(moments)))
        )
        self.times_s: Floats = np.array([moments[part].mean() for part in self._parts if len(part)])

    def __len__(self) -> int:
        return len(self.times_s)

    def busy(self) -> Floats:
        """Share of the time in which each worker computed."""
        seconds = self._table.column("prefill_s") + self._table.column("decode_s")
        lengths = np.where(self._lengths > 0, self._lengths, np.inf)
        return self._pooled(self._grid(seconds) / lengths)

    def kv(self) -> Floats:
        """Share of each worker's KV blocks that was in use."""
        return self._pooled(self._grid(self._table.column("kv_share")))

    def of_role(self, column: str, role: str) -> Floats:
        """Sum over the workers that had the role, at every time."""
        mine = self._table.where("role", role)
        sums = np.bincount(
            self._moment[mine],
            weights=self._table.column(column)[mine],
            minlength=len(self._lengths),
        ).astype(np.float64)
        row: Floats = self._pooled(sums[np.newaxis, :])[0]
        return row

    def roles(self) -> list[str]:
        """Prefill first."""
        return sorted(self._table.texts("role"), reverse=True)

    def _grid(self, values: npt.NDArray[Any]) -> Floats:
        grid = np.full((len(self.names), len(self._lengths)), np.nan)
        grid[self._worker, self._moment] = values
        return grid

    def _pooled(self, grid: Floats) -> Floats:
        parts = [grid[:, part] for part in self._parts]
        counts = np.array([(~np.isnan(part)).sum(axis=1) for part in parts]).T
        sums = np.array([np.nansum(part, axis=1) for part in parts]).T
        means: Floats = np.full(sums.shape, np.nan)
        np.divide(sums, counts, out=means, where=counts > 0)
        return means


def _natural(name: str) -> list[tuple[str, int]]:
    """d2 before d10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def link_rates(result: Result) -> tuple[Floats, dict[str, Floats]]:
    """Times, and bytes per second over all links of each kind, since the time before."""
    table = result.links
    # A link without bytes has no sample, while workers always have one.
    moments = np.unique(np.concatenate((table.column("at_s"), result.workers.column("at_s"))))
    moment = np.searchsorted(moments, table.column("at_s"))
    lengths = np.diff(moments, prepend=0.0)
    kinds = [name.partition(" ")[2] for name in table.texts("link")]
    kind = np.array([sorted(set(kinds)).index(one) for one in kinds], dtype=np.int64)
    of_row = kind[table.column("link")] if kinds else np.zeros(0, dtype=np.int64)
    rates = {}
    for number, name in enumerate(sorted(set(kinds))):
        mine = of_row == number
        sums = np.bincount(
            moment[mine], weights=table.column("bytes")[mine], minlength=len(moments)
        )
        rates[name] = np.divide(sums, lengths, out=np.zeros_like(sums), where=lengths > 0)
    return moments, rates


def link_bytes(result: Result) -> list[tuple[str, int]]:
    """All bytes over each link, most first."""
    table = result.links
    names = table.texts("link")
    sums = np.bincount(table.column("link"), weights=table.column("bytes"), minlength=len(names))
    return sorted(
        zip(names, sums.astype(np.int64).tolist(), strict=True),
        key=lambda pair: (-pair[1], pair[0]),
    )
