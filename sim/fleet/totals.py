"""The figures of a whole run, from its records and samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sim.fleet.records import OK, Record, Table, WorkerSample

Floats = npt.NDArray[np.float64]
TBT = "tbt_p90_s"  # of a request, that its SLO bounds


def good(records: Table[Record], slo_ttft_s: float, slo_tbt_s: float) -> npt.NDArray[np.bool_]:
    """Which requests were answered within both SLOs: the first token in time, and nine in ten gaps
    between tokens short enough. An answer of one token has no gap to miss."""
    late: npt.NDArray[np.bool_] = records.column(TBT) > slo_tbt_s  # NaN is not
    in_time: npt.NDArray[np.bool_] = records.column("ttft_s") <= slo_ttft_s
    return records.where("code", OK) & in_time & ~late


def distribution(samples: Floats) -> dict[str, float | None]:
    """Without NaN. All None when nothing is left."""
    kept = samples[~np.isnan(samples)]
    if not len(kept):
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    p50, p90, p99 = np.percentile(kept, (50, 90, 99))
    values = {"mean": kept.mean(), "p50": p50, "p90": p90, "p99": p99, "max": kept.max()}
    return {name: round(float(value), 6) for name, value in values.items()}


def totals(
    records: Table[Record], workers: Table[WorkerSample], slo_ttft_s: float, slo_tbt_s: float
) -> dict[str, Any]:
    """Seconds and tokens. `duration_s`: from the first arrival to the last end, for rates;
    `cached_share` is of the prompt tokens of answered requests."""
    codes = np.bincount(records.column("code"), minlength=len(records.texts("code")))
    answered = records.where("code", OK)
    prompt = records.column("prompt_tokens")[answered].sum()
    cached = records.column("cached_tokens")[answered].sum()
    output = records.column("output_tokens")[answered].sum()
    duration_s = _duration(records)
    within = int(good(records, slo_ttft_s, slo_tbt_s).sum())
    return {
        "requests": len(records),
        "codes": dict(zip(records.texts("code"), codes.tolist(), strict=True)),
        "good": within,
        "good_share": _share(within, len(records)),
        "duration_s": round(duration_s, 6),
        "goodput_per_s": _share(within, duration_s),
        "prompt_tokens": int(prompt),
        "cached_tokens": int(cached),
        "cached_share": _share(cached, prompt),
        "output_tokens": int(output),
        "output_tokens_per_s": _share(output, duration_s),
        "ttft_s": distribution(records.column("ttft_s")[answered]),
        "queue_s": distribution(records.column("queue_s")[answered]),
        "fetch_s": distribution(records.column("fetch_s")[answered]),
        "prefill_s": distribution(records.column("prefill_s")[answered]),
        "tbt_mean_s": distribution(records.column("tbt_mean_s")[answered]),
        "tbt_p90_s": distribution(records.column("tbt_p90_s")[answered]),
        "tbt_p99_s": distribution(records.column("tbt_p99_s")[answered]),
        "tbt_worst_s": distribution(records.column("tbt_worst_s")[answered]),
        "prefill_busy_s": round(float(workers.column("prefill_s").sum()), 6),
        "decode_busy_s": round(float(workers.column("decode_s").sum()), 6),
    }


def _duration(records: Table[Record]) -> float:
    if not len(records):
        return 0.0
    return float(records.column("end_s").max() - records.column("at_s").min())


def _share(part: float, whole: float) -> float:
    return round(float(part / whole), 6) if whole else 0.0
