"""What a cluster takes beyond its runners, from requests that were alone in it, or a few. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from sim.costs.calibrate import Calibrated, least_squares
from sim.costs.compute import Prefill
from sim.costs.serving import BLOCK_TOKENS, Overheads


@dataclass(frozen=True, slots=True)
class Lone:
    """A request that had the cluster to itself, or `together` equal ones that came at once: what
    their clients saw, and what all of them took of a CPU.

    `first_gap_s` is from a first token to the second, `gap_s` the median of the later ones; None
    when there are too few. `front` is conductor and clients.
    """

    together: int
    prompt: int
    output: int
    ttft_s: float
    first_gap_s: float | None
    gap_s: float | None
    front_cpu_s: float
    prefill_cpu_s: float
    decode_cpu_s: float

    @property
    def blocks(self) -> int:
        return -(-self.prompt // BLOCK_TOKENS)

    @property
    def reports(self) -> int:
        """Of workers: a first token each, and then the steps that decode all of them."""
        return self.together + self.output - 1


def fit_overheads(lone: Sequence[Lone], runner: Calibrated) -> Overheads:
    """What the runner does not explain. Nothing is less than zero.

    CPU time says what each process takes, and what a client sees beyond all of it is waiting.
    """
    single = [one for one in lone if one.together == 1]
    answers = [one for one in single if one.gap_s is not None]
    ask_s, ask_token_s, tell_s, tell_token_s = least_squares(
        [
            [one.together, one.together * one.prompt, one.reports, one.together * one.output]
            for one in lone
        ],
        [one.front_cpu_s for one in lone],
    )
    prefill_s, prefill_token_s, lend_s = least_squares(
        [[1.0, one.prompt, float(one.output > 1)] for one in single],
        [one.prefill_cpu_s - _prefill_s(one, runner) for one in single],
    )
    decoding = [one for one in lone if one.gap_s is not None]
    decode_s, decode_seq_s = least_squares(
        [[1.0, one.together] for one in decoding],
        [_known(one.gap_s) - _step_s(one, runner) for one in decoding],
    )

    def handoff_cpu_s(one: Lone) -> float:
        """At most what the client waited: an answer has many steps, and a little more CPU time in
        each is no handoff."""
        step_s = _step_s(one, runner) + decode_s + decode_seq_s
        return min(one.decode_cpu_s - (one.output - 1) * step_s, _handoff_s(one))

    handoff_s, handoff_block_s = least_squares(
        [[1.0, one.blocks] for one in answers], [handoff_cpu_s(one) for one in answers]
    )
    # Who waits less than everybody computes does not wait for all of it.
    fixed_s = ask_s + prefill_s + tell_s + tell_token_s
    ask_waits = [
        one.ttft_s
        - fixed_s
        - (ask_token_s + prefill_token_s) * one.prompt
        - _prefill_s(one, runner)
        for one in single
    ]
    ask_wait_s = median(ask_waits)
    later_s = min(prefill_s, max(0.0, -ask_wait_s))
    handoff_waits = [_handoff_s(one) - handoff_s - handoff_block_s * one.blocks for one in answers]
    return Overheads(
        ask_s=ask_s,
        ask_token_s=ask_token_s,
        ask_wait_s=max(0.0, ask_wait_s),
        tell_s=tell_s,
        tell_token_s=tell_token_s,
        prefill_s=prefill_s - later_s,
        prefill_token_s=prefill_token_s,
        decode_s=decode_s,
        decode_seq_s=decode_seq_s,
        handoff_s=handoff_s,
        handoff_block_s=handoff_block_s,
        handoff_wait_s=max(0.0, median(handoff_waits)),
        lend_s=lend_s + later_s,
    )


def _prefill_s(one: Lone, runner: Calibrated) -> float:
    return runner.seconds([Prefill(one.prompt)], [])


def _step_s(one: Lone, runner: Calibrated) -> float:
    """Of a bare runner, halfway through the answers."""
    return runner.seconds([], [one.prompt + one.output // 2] * one.together)


def _handoff_s(one: Lone) -> float:
    """As a client sees it: how much later than others the second token comes."""
    return _known(one.first_gap_s) - _known(one.gap_s)


def _known(seconds: float | None) -> float:
    assert seconds is not None
    return seconds
