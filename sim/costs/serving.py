"""What a cluster on one calibrated machine takes beyond its engines' steps, and how they share it.

`baton serve` places workers on the machine's cores, next to the conductor and to the clients. The
part `serving` of a calibration file says what these take of a core, measured on an idle cluster
(`python -m bench.calibration`), and how much engines slow each other down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from baton.errors import ConfigError
from sim.costs.compute import Prefill, StepCost
from sim.costs.cores import Beside, Kind

BLOCK_TOKENS = 512  # of a block that is handed over in the simulator


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds of a core, but for those called `wait`, in which nobody computes.

    The front is conductor and client: `ask` for a request, `tell` for what a worker reports after a
    step. `prefill` and `decode` are what steps of a worker take beyond those of a bare runner.
    `handoff` is the decode worker's, from the first token until it decodes the second, and `lend`
    the prefill worker's, which nobody waits for.
    """

    ask_s: float = 0.0
    ask_token_s: float = 0.0  # of the prompt
    ask_wait_s: float = 0.0
    tell_s: float = 0.0  # of a report
    tell_token_s: float = 0.0  # and of a token in it
    prefill_s: float = 0.0  # of a prompt in a step
    prefill_token_s: float = 0.0
    decode_s: float = 0.0  # of a step
    decode_seq_s: float = 0.0  # and of a sequence in it
    handoff_s: float = 0.0
    handoff_block_s: float = 0.0  # of BLOCK_TOKENS
    handoff_wait_s: float = 0.0
    lend_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Serving:
    cores: int
    overheads: Overheads
    beside: Beside


@dataclass(frozen=True, slots=True)
class ServedCost:
    """Implements `StepCost`: a runner's step inside of a worker."""

    runner: StepCost
    overheads: Overheads

    def seconds(self, prefill: Sequence[Prefill], decode: Sequence[int]) -> float:
        more = self.overheads
        seconds = self.runner.seconds(prefill, decode)
        if prefill:
            tokens = sum(part.new for part in prefill)
            seconds += more.prefill_s * len(prefill) + more.prefill_token_s * tokens
        if decode:
            seconds += more.decode_s + more.decode_seq_s * len(decode)
        return seconds


def serving_of(data: Mapping[str, Any]) -> Serving:
    """Of the part `serving` of a calibration file. Raises ConfigError."""
    known = {field.name for field in fields(Overheads)}
    try:
        overheads, cores = data["overheads"], int(data["cores"])
        if unknown := overheads.keys() - known:
            raise ConfigError(f"a calibration knows no {', '.join(sorted(unknown))}")
        beside = {
            (Kind(kind), Kind(other)): float(times)
            for kind, others in data["beside"].items()
            for other, times in others.items()
        }
        return Serving(cores, Overheads(**overheads), beside)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the part `serving` of a calibration is broken: {error!r}") from error
