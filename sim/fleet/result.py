"""The result of a simulation, in memory and as a JSON file: equal runs give equal bytes."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from baton.errors import ConfigError
from sim.fleet.records import Event, LinkSample, Record, Table, WorkerSample

FORMAT = "baton-sim"
VERSION = 1  # of the file's format


@dataclass(frozen=True, slots=True)
class Result:
    """`spec`: what was simulated (FleetSpec.as_json()), with its SLOs `slo_ttft_s` and `slo_tbt_s`;
    `workload`: what was asked, in words and numbers; `totals`: figures of the whole run
    (`totals.totals`). Nothing in it depends on when or how fast it was simulated."""

    spec: Mapping[str, Any]
    workload: Mapping[str, Any]
    totals: Mapping[str, Any] = field(default_factory=dict)
    records: Table[Record] = field(default_factory=lambda: Table(Record))
    workers: Table[WorkerSample] = field(default_factory=lambda: Table(WorkerSample))
    links: Table[LinkSample] = field(default_factory=lambda: Table(LinkSample))
    events: Table[Event] = field(default_factory=lambda: Table(Event))


def write_result(result: Result, path: Path) -> None:
    """Packed when the name ends in .gz."""
    data = encode(result)
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=6, mtime=0)  # no time, or bytes would differ
    path.write_bytes(data)


def encode(result: Result) -> bytes:
    body = {
        "format": FORMAT,
        "version": VERSION,
        "spec": result.spec,
        "workload": result.workload,
        "totals": result.totals,
        "records": result.records.as_json(),
        "workers": result.workers.as_json(),
        "links": result.links.as_json(),
        "events": result.events.as_json(),
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"


def read_result(path: Path) -> Result:
    """Raises ConfigError."""
    try:
        data = path.read_bytes()
        return _decode(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no result of baton sim ({error!r})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from error


def _decode(data: bytes) -> Result:
    body = orjson.loads(data)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ConfigError("not a result of baton sim")
    if body.get("version") != VERSION:
        raise ConfigError(f"format version {body.get('version')}, but this program reads {VERSION}")
    return Result(
        body["spec"],
        body["workload"],
        body["totals"],
        Table.from_json(Record, body["records"]),
        Table.from_json(WorkerSample, body["workers"]),
        Table.from_json(LinkSample, body["links"]),
        Table.from_json(Event, body["events"]),
    )
