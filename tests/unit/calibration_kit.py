"""A machine whose costs are known: what its calibration must find, and what it predicts."""

from __future__ import annotations

from sim.costs.calibrate import Calibrated
from sim.costs.serving import Overheads

ENGINE = Calibrated(step_s=0.004, token_s=2e-4, pair_s=1e-8, decode_s=5e-4, context_s=1e-7)
OVERHEADS = Overheads(
    ask_s=0.002,
    ask_token_s=1e-6,
    ask_wait_s=0.001,
    tell_s=5e-4,
    tell_token_s=2e-4,
    prefill_s=0.003,
    prefill_token_s=1e-5,
    decode_s=0.001,
    decode_seq_s=3e-4,
    handoff_s=0.004,
    handoff_block_s=0.001,
    handoff_wait_s=0.002,
    lend_s=0.0005,
)
