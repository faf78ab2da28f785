"""What `baton doctor` asks of a machine and of a Redis, asked of this one and of real servers."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from pathlib import Path

import pytest

from baton.cli.doctor import compute, memory, services
from baton.cli.doctor.disk_speed import measure
from baton.cli.doctor.finding import Verdict
from baton.cli.doctor.kernel_clock import kernel_clock
from baton.cli.doctor.machine import ThisMachine
from baton.cli.doctor.redis_probe import ask, options_of
from baton.cli.doctor.wanted import Wanted
from baton.errors import BatonError, ConfigError
from tests.certificates import Authority
from tests.redis_server import BINARY, WHY_NOT, redis_server
from tests.unit.doctor_kit import FakeMachine

ROOT = Path(__file__).resolve().parents[2]
NOTHING = Wanted()


def test_everything_that_needs_no_probe_is_found_here() -> None:
    machine = ThisMachine({})
    for check in (compute.python, compute.cpus, compute.native, memory.memory, memory.open_files):
        assert check(machine, NOTHING).verdict is not Verdict.FAIL
    assert services.demo_model(machine, NOTHING).verdict is Verdict.OK
    assert machine.run("no-such-program") is None
    assert machine.names("/no/such/place") == []


def test_a_probe_that_breaks_is_one_line() -> None:
    assert "KeyError" in str(ThisMachine({}).probe("no-such-library"))


def test_a_disk_is_timed_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.cli.doctor.disk_speed.MOST", 16 << 20)
    speed = measure(str(tmp_path))
    assert speed.write > 0
    assert speed.read > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="No such file"):
        measure(str(tmp_path / "none"))


def test_the_kernel_tells_of_its_clock() -> None:
    try:
        synchronised, error_s = kernel_clock()
    except PermissionError:
        pytest.skip("this container may not ask")
    assert isinstance(synchronised, bool)
    assert error_s >= 0


def test_blocks_are_read_from_another_process() -> None:
    moved = ThisMachine(dict(os.environ)).probe("transfer", "shm")
    assert isinstance(moved, dict), moved
    assert moved["bytes_per_s"] > 0


def asked(**options: str) -> dict[str, object] | str:
    environ = {f"BATON_REDIS{name and '_'}{name.upper()}": text for name, text in options.items()}
    try:
        return asyncio.run(ask(environ))
    except BatonError as error:
        return services.redis(FakeMachine({("redis",): error.message}), Wanted(redis=True)).advice


@pytest.mark.skipif(BINARY is None, reason=WHY_NOT)
def test_a_real_redis_is_written_and_read() -> None:
    documented = re.search(r"ACL SETUSER (.*)", (ROOT / "docs/redis.md").read_text())
    assert documented is not None
    with redis_server("secret", acl=documented[1].replace("PASSWORD", "own")) as server:
        at = {"": f"redis://{server.address}"}
        found = asked(**at, password="secret")
        assert isinstance(found, dict)
        assert found["address"] == server.address
        assert isinstance(found["offset_s"], float)
        assert abs(found["offset_s"]) < 5
        as_documented = asked(**at, username="baton", password="own")
        assert isinstance(as_documented, dict)
        assert as_documented["offset_s"] is None  # it may not ask for the time
        assert "the prefix" in str(asked(**at, username="baton", password="own", prefix="other"))
        assert "BATON_REDIS_PASSWORD" in str(asked(**at))
        assert "BATON_REDIS_PASSWORD" in str(asked(**at, password="wrong"))


@pytest.mark.skipif(BINARY is None, reason=WHY_NOT)
def test_a_real_redis_with_tls_says_what_is_missing(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("client")
    with redis_server("secret", tls=authority) as server:
        at = {"": f"rediss://{server.address}", "password": "secret"}
        trusting = {**at, "ca_file": str(authority.ca)}
        shown = {**trusting, "cert_file": str(pair.cert), "key_file": str(pair.key)}
        assert isinstance(asked(**shown), dict)
        assert "BATON_REDIS_CERT_FILE" in str(asked(**trusting))
        assert "BATON_REDIS_CA_FILE" in str(asked(**at))
        assert "can read" in str(asked(**{**at, "ca_file": "/none"}))
        assert "rediss://" in str(asked(**{"": f"redis://{server.address}"}))


def test_redis_has_the_options_of_the_processes() -> None:
    environ = {
        "BATON_REDIS": "rediss://r:6379",
        "BATON_REDIS_USERNAME": "baton",
        "BATON_CLUSTER_NAME": "blue",
    }
    options = options_of(environ)
    assert (options.url, options.username, options.cluster) == ("rediss://r:6379", "baton", "blue")
    names = {field.name for field in dataclasses.fields(options)}
    assert {"password", "password_file", "ca_file"} <= names
