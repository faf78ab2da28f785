"""What a simulation writes down: rows as frozen values, kept and stored as columns."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigError

OK = "ok"  # the code of a request that was answered
_DIGITS = 6  # of seconds in a file: microseconds


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times between tokens are those of its own stream, None when there was no second
    token; `prefill` and `decode` are the workers of the last attempt, empty when there was none.
    What its prompt waited for is None when its worker had not said so before the answer ended."""

    index: int
    at_s: float
    code: str  # OK, or the code of the error that it ended with
    ttft_s: float | None
    end_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    tbt_mean_s: float | None
    tbt_p50_s: float | None
    tbt_p90_s: float | None
    tbt_p99_s: float | None
    tbt_worst_s: float | None  # mean of the longest tenth
    tbt_max_s: float | None
    prefill: str
    decode: str
    predicted_ttft_s: float | None
    queue_s: float | None  # that its prompt waited at the worker that computed it
    fetch_s: float | None  # that KV took to come, before anything could be computed
    prefill_s: float | None  # that its prompt took, from its first step to the first token


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """A worker at one moment; busy seconds are those since the sample before."""

    at_s: float
    worker: str
    role: str
    queue: int  # requests that wait for their prefill or for blocks
    running: int
    kv_share: float  # of its pool's blocks, in use
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class LinkSample:
    """Bytes that went over a link since the sample before. Its name is its node's,
    a space, and what it is, such as `NIC out`."""

    at_s: float
    link: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a reader of the report should know of, such as a worker's new role."""

    at_s: float
    text: str


Row = TypeVar("Row")
Column = npt.NDArray[np.float64] | npt.NDArray[np.int64]


class Table(Generic[Row]):
    """Rows of one dataclass of floats (or None), integers and strings, as columns. A column
    of strings keeps each different one once."""

    def __init__(self, row_type: type[Row]) -> None:
        hints = get_type_hints(row_type)
        self._row_type = row_type
        self._names = [field.name for field in fields(row_type)]  # type: ignore[arg-type]
        self._texts: dict[str, dict[str, int]] = {n: {} for n in self._names if hints[n] is str}
        self._columns: dict[str, array[Any]] = {
            name: array("q" if hints[name] is int or hints[name] is str else "d")
            for name in self._names
        }

    def __len__(self) -> int:
        return len(self._columns[self._names[0]])

    def append(self, row: Row) -> None:
        for name, column in self._columns.items():
            value = getattr(row, name)
            if name in self._texts:
                known = self._texts[name]
                value = known.setdefault(value, len(known))
            column.append(float("nan") if value is None else value)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Numbers; None is NaN. Of strings: numbers that stand for `texts(name)`. A copy."""
        column = self._columns[name]
        return np.array(column, dtype=np.float64 if column.typecode == "d" else np.int64)

    def texts(self, name: str) -> list[str]:
        """The different strings of a column, in the order in which they first came."""
        return list(self._texts[name])

    def where(self, name: str, text: str) -> npt.NDArray[np.bool_]:
        """Which rows have this string."""
        wanted: npt.NDArray[np.bool_] = self.column(name) == self._texts[name].get(text, -1)
        return wanted

    def as_json(self) -> dict[str, Any]:
        """For orjson with OPT_SERIALIZE_NUMPY. Floats are rounded, so that equal runs give equal
        bytes and files stay small."""
        body: dict[str, Any] = {}
        for name in self._names:
            values = self.column(name)
            numbers = np.round(values, _DIGITS) if values.dtype == np.float64 else values
            body[name] = (
                {"texts": self.texts(name), "of": numbers} if name in self._texts else numbers
            )
        return body

    @classmethod
    def from_json(cls, row_type: type[Row], body: Mapping[str, Any]) -> Table[Row]:
        """Raises ConfigError."""
        table = cls(row_type)
        for name, column in table._columns.items():
            if name not in body:
                raise ConfigError(f"{row_type.__name__} rows without {name}")
            stored: Any = body[name]
            if name in table._texts:
                table._texts[name] = {text: n for n, text in enumerate(stored["texts"])}
                stored = stored["of"]
            dtype = np.float64 if column.typecode == "d" else np.int64
            column.frombytes(np.array(stored, dtype=dtype).tobytes())  # null becomes NaN
        if len({len(column) for column in table._columns.values()}) > 1:
            raise ConfigError(f"{row_type.__name__} columns of different lengths")
        return table


def table_of(row_type: type[Row], rows: Sequence[Row]) -> Table[Row]:
    table = Table(row_type)
    for row in rows:
        table.append(row)
    return table
