"""What a check says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"  # something optional is missing, or slow
    FAIL = "fail"  # baton cannot serve here, or not what was asked for


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice`: the remedy, or what it means."""

    verdict: Verdict
    detail: str
    advice: str = ""


def ok(detail: str, advice: str = "") -> Finding:
    return Finding(Verdict.OK, detail, advice)


def warn(detail: str, advice: str = "") -> Finding:
    return Finding(Verdict.WARN, detail, advice)


def fail(detail: str, advice: str = "") -> Finding:
    return Finding(Verdict.FAIL, detail, advice)
