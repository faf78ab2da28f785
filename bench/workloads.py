"""The loads: what is asked, and when. The same seed gives the same requests on every machine."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from baton.bench.trace import TraceRequest
from bench.client import Ask
from bench.shapes import FIRST_WORD


@dataclass(frozen=True, slots=True)
class Waves:
    """Each wave is sent when the one before has been answered, at most `concurrency` at once."""

    waves: tuple[tuple[Ask, ...], ...]
    concurrency: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """Closed loop at one concurrency after the other, each with requests of its own."""

    steps: tuple[tuple[int, tuple[Ask, ...]], ...]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Open loop. `at` are arrival times that would last one second per request on average; the
    rate, in requests per second, scales them. `calibration`: same lengths, other tokens."""

    asks: tuple[Ask, ...]
    at: tuple[float, ...]
    calibration: tuple[Ask, ...]
    own_rate: bool  # a share of what this system itself can do, or of what the reference can


@dataclass(frozen=True, slots=True)
class Interference:
    """`streams` decode; when each has had `settle` events, `long` arrives."""

    streams: tuple[Ask, ...]
    settle: int
    long: Ask


Load = Waves | Sweep | Arrivals | Interference


@dataclass(frozen=True, slots=True)
class Setting:
    """What loads are made from. `quick` makes them small: for trying out, not for results."""

    vocab: int
    seed: int = 0
    quick: bool = False
    trace: tuple[TraceRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """`build(setting, round)`: prompts differ between rounds, so prefix caches do not help."""

    name: str
    describe: str
    build: Callable[[Setting, int], Load]
    needs_trace: bool = False


class _Words:
    """Draws prompts."""

    def __init__(self, setting: Setting, name: str, round_: int) -> None:
        self.random = random.Random(f"{setting.seed}/{name}/{round_}")
        self._vocab = setting.vocab

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.choices(range(FIRST_WORD, self._vocab), k=count))


def _batch16(setting: Setting, round_: int) -> Waves:
    words = _Words(setting, "batch16", round_)
    waves = 1 if setting.quick else 3
    return Waves(
        tuple(tuple(Ask(words.tokens(512), 64) for _ in range(16)) for _ in range(waves)), 16
    )


def _shared(setting: Setting, round_: int) -> Waves:
    words = _Words(setting, "shared", round_)
    prefix = words.tokens(1024)
    count = 16 if setting.quick else 32
    return Waves((tuple(Ask(prefix + words.tokens(128), 32) for _ in range(count)),), 8)


def _stream(setting: Setting, round_: int) -> Waves:
    words = _Words(setting, "stream", round_)
    return Waves(((Ask(words.tokens(64), 64 if setting.quick else 256),),), 1)


def _saturation(setting: Setting, round_: int) -> Sweep:
    words = _Words(setting, "saturation", round_)
    count = 32 if setting.quick else 96

    def asks() -> tuple[Ask, ...]:
        return tuple(Ask(words.tokens(words.random.randint(256, 512)), 64) for _ in range(count))

    return Sweep(tuple((concurrency, asks()) for concurrency in (8, 16, 32)))


def _interference(setting: Setting, round_: int) -> Interference:
    words = _Words(setting, "interference", round_)
    # The streams outlast the prefill and are given up after it.
    streams = tuple(Ask(words.tokens(64), 8000) for _ in range(8))
    return Interference(streams, 64, Ask(words.tokens(4096 if setting.quick else 16384), 8))


def _trace(own_rate: bool) -> Callable[[Setting, int], Arrivals]:
    def build(setting: Setting, round_: int) -> Arrivals:
        words = _Words(setting, "trace", round_)
        count = 40 if setting.quick else 200
        start = round_ * count % max(1, len(setting.trace) - count)
        window = setting.trace[start : start + count]

        def asks() -> tuple[Ask, ...]:
            return tuple(Ask(words.tokens(r.input_tokens), r.output_tokens) for r in window)

        span = window[-1].at_s - window[0].at_s
        at = tuple((r.at_s - window[0].at_s) * (count - 1) / span for r in window)
        # Both workloads are built from one name: same requests, own tokens for the calibration.
        measured, calibration = asks(), asks()
        if own_rate:
            measured = asks()
        return Arrivals(measured, at, calibration, own_rate)

    return build


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("batch16", "3 waves of 16 at once: 512 tokens in, 64 out", _batch16),
        Workload(
            "shared", "32 at concurrency 8: 1,024 shared tokens + 128 own in, 32 out", _shared
        ),
        Workload("stream", "one at a time: 64 tokens in, 256 out", _stream),
        Workload("saturation", "closed loop of 96 at 8, 16, 32: 256-512 in, 64 out", _saturation),
        Workload("interference", "8 streams decode when 16,384 tokens arrive", _interference),
        Workload(
            "trace",
            "200 of the trace, open loop at 80 % of what the reference peer can do",
            _trace(own_rate=False),
            needs_trace=True,
        ),
        Workload(
            "trace-own",
            "200 of the trace, open loop at 80 % of what the system itself can do",
            _trace(own_rate=True),
            needs_trace=True,
        ),
    )
}
