"""`baton doctor` on certificates: made-up ones, and real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.cli.doctor import services
from baton.cli.doctor.certificates import seconds_left
from baton.cli.doctor.finding import Finding, Verdict
from baton.cli.doctor.machine import Found
from baton.cli.doctor.wanted import Wanted
from baton.errors import ConfigError
from tests.certificates import Authority
from tests.unit.doctor_kit import FakeMachine

DAY_S = 24 * 3600.0


def look(found: Found) -> Finding:
    machine = FakeMachine({("certificates",): found})
    finding = services.certificates(machine, Wanted(certificates=True))
    assert finding is not None
    return finding


def test_they_are_looked_at_where_there_are_any() -> None:
    assert services.certificates(FakeMachine(), Wanted()) is None


@pytest.mark.parametrize(
    ("left_s", "expected"),
    [(90 * DAY_S, Verdict.OK), (2 * DAY_S, Verdict.WARN), (0.0, Verdict.FAIL)],
)
def test_the_one_that_ends_first_counts(left_s: float, expected: Verdict) -> None:
    shown = look({"left_s": {"a.crt": 365 * DAY_S, "b.crt": left_s}})
    assert shown.verdict is expected
    assert ("b.crt" in shown.detail) is (expected is not Verdict.OK)


def test_what_cannot_be_used_is_said() -> None:
    assert look("peers would refuse a.crt: certificate has expired").verdict is Verdict.FAIL


def test_files_are_checked_as_the_processes_do(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, front = authority.issue("baton"), authority.issue("localhost", expired=True)
    environ = {
        "BATON_TLS_CERT": str(pair.cert),
        "BATON_TLS_KEY": str(pair.key),
        "BATON_TLS_CA": str(authority.ca),
        "BATON_SSL_CERTFILE": str(front.cert),
        "BATON_SSL_KEYFILE": str(front.key),
    }
    left = seconds_left(environ)
    assert left[str(pair.cert)] > DAY_S
    assert left[str(front.cert)] == 0
    assert seconds_left({}) == {}
    with pytest.raises(ConfigError, match="BATON_TLS_KEY is not"):
        seconds_left({"BATON_TLS_CERT": "a"})
