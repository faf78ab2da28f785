"""Simulations that are run once: results are kept in a directory, by what went into them."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import orjson

from sim.fleet.result import Result, read_result, write_result
from sim.fleet.run import simulate
from sim.fleet.spec import FleetSpec
from sim.workload.make import made_by
from sim.workload.trace import LoadCurve, Request, read_trace, scaled, trace_line

ROOT = Path(__file__).parents[2]
_PACKAGES = ("baton", "conductor", "prefill_worker", "decode_worker", "kvstore", "sim")
_AFTERWARDS = ("sim/results/", "sim/report/")  # what only reads results
ONE_TOKEN = 1e-6  # an output scale with which every answer has one token


@dataclass(frozen=True, slots=True)
class Replay:
    """How much of the trace, and how. `load`: as in `LoadCurve.parse`. `make`: the arguments with
    which `baton sim workload make` writes another trace instead."""

    first: int | None = None  # requests; None: all
    speed: float = 1.0
    output_scale: float = 1.0
    load: str = ""
    make: str = ""

    def as_json(self) -> dict[str, Any]:
        """Without texts that are empty."""
        return {name: value for name, value in asdict(self).items() if value != ""}


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation."""

    spec: FleetSpec
    replay: Replay

    def command(self) -> str:
        """That makes the same result, whose trace is called FILE."""
        make, replay = self.replay.make, replace(self.replay, make="")
        trace = f"<(python -m sim.workload make {make})" if make else "FILE"
        return " ".join(["python -m sim.fleet --trace", trace, *_flags(self.spec), *_flags(replay)])

    def as_json(self) -> dict[str, Any]:
        return {"spec": self.spec.as_json(), "replay": self.replay.as_json()}


@dataclass(frozen=True, slots=True)
class Outcome:
    """`requests`: what was asked."""

    run: Run
    result: Result
    requests: Sequence[Request]
    cpu_s: float  # of the simulation, on the machine that ran it
    wall_s: float


class Runs:
    """Of one trace and these sources. What was simulated before is read from `directory`, so that
    runs that were stopped go on. With `only_kept`, nothing is simulated."""

    def __init__(self, trace: Path, directory: Path, only_kept: bool = False) -> None:
        self.sources = sources_digest()
        self._trace = trace
        self._trace_digest = hashlib.sha256(trace.read_bytes()).hexdigest()
        self._directory = directory
        self._only_kept = only_kept
        self._asked: dict[Replay, Sequence[Request]] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def outcome(self, run: Run) -> Outcome | None:
        """None if it is not kept and nothing is to be simulated."""
        stem = self._directory / self._key(run)
        path, told = stem.with_suffix(".json.gz"), stem.with_suffix(".cost.json")
        if not path.exists():
            if self._only_kept:
                return None
            self._simulate(run, path, told)
        cost = orjson.loads(told.read_bytes())
        return Outcome(run, read_result(path), self._requests(run.replay), **cost)

    def _key(self, run: Run) -> str:
        parts = {"run": run.as_json(), "trace": self._trace_digest, "sources": self.sources}
        data = orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)
        return f"{run.spec.cluster}-{hashlib.sha256(data).hexdigest()[:16]}"

    def _simulate(self, run: Run, path: Path, told: Path) -> None:
        cpu_s, wall_s = time.process_time(), time.monotonic()
        result = simulate(run.spec, iter(self._requests(run.replay)), run.replay.as_json())
        cost = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.monotonic() - wall_s}
        told.write_bytes(orjson.dumps(cost))
        part = path.with_name(f"part-{path.name}")  # a result has its name when it is whole
        write_result(result, part)
        part.replace(path)

    def _requests(self, replay: Replay) -> Sequence[Request]:
        if replay not in self._asked:
            whole = _made(replay) if replay.make else read_trace(self._trace)
            changed = scaled(whole, replay.speed, output_scale=replay.output_scale)
            if replay.load:
                changed = LoadCurve.parse(replay.load).applied(changed)
            self._asked[replay] = list(itertools.islice(changed, replay.first))
        return self._asked[replay]


def _made(replay: Replay) -> list[Request]:
    """As they come out of a file: times are rounded, and begin with the first request."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        for request in itertools.islice(made_by(replay.make), replay.first):
            file.write(trace_line(request))
        file.flush()
        return read_trace(Path(file.name))


def sources_digest(root: Path = ROOT) -> str:
    """Of everything that a simulation runs."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(_AFTERWARDS):
                digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _flags(value: FleetSpec | Replay) -> Iterator[str]:
    """What differs from the defaults."""
    for field in fields(value):
        said = getattr(value, field.name)
        if said != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            yield flag if said is True else f"{flag} {said}"
