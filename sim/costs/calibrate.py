"""Costs of a real machine, fitted to what `baton bench engine --json` measured on it.

The same shape as `sim.costs.compute`, with one coefficient for each of its terms:

    step = a + b x new tokens + c x pairs of attention + d x decodes + e x their contexts

Pairs are (new token, token that it sees). Coefficients are not negative: non-negative least squares
of relative errors, so that a decode of 50 ms counts as much as a prompt of 10 s. With five unknowns
every set of terms is tried, which is exact and needs no solver.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigError
from sim.costs.compute import Prefill
from sim.costs.serving import Serving, serving_of

PREFIX = "calibrated:"

_PREFILL = re.compile(r"prefill (\d+)")
_DECODE = re.compile(r"decode (\d+) x (\d+)")
_MIXED = re.compile(r"mixed (\d+) x (\d+) and (\d+) after (\d+)")

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Implements `StepCost`. Seconds: of a step, and of each of what is in it."""

    step_s: float
    token_s: float
    pair_s: float
    decode_s: float
    context_s: float

    def seconds(self, prefill: Sequence[Prefill], decode: Sequence[int]) -> float:
        if not prefill and not decode:
            return 0.0
        counts = _counts(prefill, decode)
        terms = (self.step_s, self.token_s, self.pair_s, self.decode_s, self.context_s)
        return sum(count * term for count, term in zip(counts, terms, strict=True))


@dataclass(frozen=True, slots=True)
class Point:
    """A figure of the bench: steps that were run one after another, in `seconds` together."""

    name: str
    steps: tuple[tuple[tuple[Prefill, ...], tuple[int, ...]], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a machine's files say. `errors`: of the fit at every point, relative to the figure.

    The figures are of a runner alone, and so are `runner` and `errors`. `cost` is that of an
    engine: with `gap_s` between its steps, where the files have it (part `loop` of the bench).
    """

    model: str
    device: str
    kv_bytes_per_token: int
    runner: Calibrated
    cost: Calibrated
    gap_s: float
    errors: tuple[tuple[str, float], ...]
    serving: Serving | None = None  # of a whole cluster on the machine, where a file has it

    @property
    def worst(self) -> float:
        return max(abs(error) for _, error in self.errors)


def calibrated(text: str) -> Calibration:
    """Of `calibrated:FILE`, or of several files of one machine and model, separated by commas.

    Raises ConfigError when a file cannot be used, or when all together leave a term unknown: they
    need two lengths of prompts, and decodes of two batch sizes and of two contexts.
    """
    paths = [Path(name) for name in text.removeprefix(PREFIX).split(",")]
    files = [_read(path) for path in paths]
    kinds = {(file["model"], file["device"], file["kv_token_bytes"]) for file in files}
    if len(kinds) != 1:
        raise ConfigError(f"{text} is of several models or machines: {sorted(kinds)}")
    [(model, device, kv_bytes)] = kinds
    points = [point for file in files for point in _points(file)]
    try:
        runner = fit(points)
    except ValueError as error:
        raise ConfigError(f"{text}: {error}") from error
    errors = tuple((point.name, _predicted(runner, point) / point.seconds - 1) for point in points)
    gaps = [float(loop["gap_s"]) for file in files for loop in file.get("loop", ())]
    gap_s = median(gaps) if gaps else 0.0
    cost = replace(runner, step_s=runner.step_s + gap_s)
    parts = [serving_of(file["serving"]) for file in files if "serving" in file]
    serving = next(iter(parts), None)
    return Calibration(model, device, kv_bytes, runner, cost, gap_s, errors, serving)


def fit(points: Sequence[Point]) -> Calibrated:
    """Raises ValueError when the points do not determine every term."""
    rows = np.array([np.sum([_counts(*step) for step in p.steps], axis=0) for p in points])
    seconds = np.array([point.seconds for point in points])
    weighted: Matrix = rows / seconds[:, None] if len(points) else np.zeros((0, 5))
    if np.linalg.matrix_rank(weighted / np.maximum(weighted.max(axis=0, initial=0), 1e-30)) < 5:
        raise ValueError(
            "too few figures for a fit: two lengths of prompts are needed, and decodes of two "
            "batch sizes and two contexts"
        )
    return Calibrated(*least_squares(weighted, np.ones(len(weighted))))


def least_squares(rows: npt.ArrayLike, wanted: npt.ArrayLike) -> tuple[float, ...]:
    """Coefficients of `rows`, none of them negative, whose sums are nearest to `wanted`."""
    solutions = _solutions(np.asarray(rows, np.float64), np.asarray(wanted, np.float64))
    return min(solutions, key=lambda solution: solution[0])[1]


def _solutions(rows: Matrix, wanted: Matrix) -> Iterator[tuple[float, tuple[float, ...]]]:
    """Squared error and coefficients of every set of terms that needs no negative one. The best
    of these is the non-negative optimum: that one uses some set, and is the least squares of it."""
    terms = rows.shape[1]
    yield float((wanted**2).sum()), (0.0,) * terms
    for size in range(1, terms + 1):
        for chosen in combinations(range(terms), size):
            part = rows[:, chosen]
            scale = part.max(axis=0)
            found = np.linalg.lstsq(part / scale, wanted, rcond=None)[0] / scale
            if (found < 0).any():
                continue
            whole = np.zeros(terms)
            whole[list(chosen)] = found
            error = float(((rows @ whole - wanted) ** 2).sum())
            yield error, tuple(float(value) for value in whole)


def _counts(prefill: Iterable[Prefill], decode: Sequence[int]) -> tuple[float, ...]:
    """What the coefficients are multiplied by, in the order of the fields of `Calibrated`."""
    tokens, pairs = 0, 0.0
    for part in prefill:
        tokens += part.new
        pairs += part.new * part.context + part.new * (part.new + 1) / 2
    return 1.0, float(tokens), pairs, float(len(decode)), float(sum(decode))


def _predicted(cost: Calibrated, point: Point) -> float:
    return sum(cost.seconds(prefill, decode) for prefill, decode in point.steps)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    wanted = {"model", "device", "kv_token_bytes", "options", "prefill", "decode"}
    if not isinstance(found, dict) or not wanted <= found.keys():
        raise ConfigError(f"{path} is not of `baton bench engine --json`")
    return found


def _points(file: dict[str, Any]) -> Iterator[Point]:
    step_tokens = int(file["options"]["step_tokens"])
    for figure in (*file["prefill"], *file["decode"], *file.get("mixed", ())):
        if "skipped" not in figure:
            yield _point(figure["name"], float(figure["median_s"]), step_tokens)


def _point(name: str, seconds: float, step_tokens: int) -> Point:
    if match := _PREFILL.fullmatch(name):
        [tokens] = map(int, match.groups())
        starts = range(0, tokens, step_tokens)
        chunks = tuple(Prefill(min(step_tokens, tokens - start), start) for start in starts)
        return Point(name, tuple(((chunk,), ()) for chunk in chunks), seconds)
    if match := _DECODE.fullmatch(name):
        batch, context = map(int, match.groups())
        return Point(name, (((), (context,) * batch),), seconds)
    if match := _MIXED.fullmatch(name):
        batch, context, new, start = map(int, match.groups())
        return Point(name, (((Prefill(new, start),), (context,) * batch),), seconds)
    raise ConfigError(f"a figure is called {name!r}, which no bench of this version writes")
