"""The same requests in the simulator, on the machine as it was calibrated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.calibration.cluster import KV_MIB
from bench.calibration.load import Planned, requests
from bench.calibration.results import Seen
from sim.costs.models import model_named
from sim.fleet.prompts import BLOCK_TOKENS
from sim.fleet.records import OK
from sim.fleet.run import simulate
from sim.fleet.spec import FleetSpec


def spec_of(cluster: str, shape: str, calibration: Path) -> FleetSpec:
    """As `bench.calibration.cluster` starts it."""
    block_bytes = model_named(shape).kv_bytes_per_token * BLOCK_TOKENS
    return FleetSpec(
        cluster,
        model=shape,
        node=f"calibrated:{calibration}",
        grain=1,
        kv_blocks=(KV_MIB << 20) // block_bytes,
        chunk_tokens=2048,  # as workers have it
        mixed_tokens=2048,
        max_seqs=64,
        max_model_len=4096,
    )


def predict(spec: FleetSpec, planned: Sequence[Planned]) -> tuple[Seen, dict[str, float]]:
    """What clients see, and mean seconds of what a first token waits for, as `ttft_parts` of a
    replay. Raises SystemExit when a simulated request fails."""
    result = simulate(spec, iter(requests(planned)), {})
    records = result.records
    if not records.where("code", OK).all():
        raise SystemExit(f"simulated requests failed: {result.totals['codes']}")
    parts = {
        stage: float(np.nanmean(records.column(f"{stage}_s")))
        for stage in ("queue", "fetch", "prefill")
    }
    order = records.column("index").argsort()
    seen = Seen(
        tuple(float(ttft) for ttft in records.column("ttft_s")[order]),
        tuple(
            None if math.isnan(tpot) else float(tpot)
            for tpot in records.column("tbt_mean_s")[order]
        ),
    )
    return seen, parts
