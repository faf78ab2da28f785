"""What `baton serve` will start: processes, their flags, their CPUs and ports."""

from __future__ import annotations

import errno
import itertools
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from baton.cli import main
from baton.cli.plan import make_plan, new_environ, place_conductor, place_workers
from baton.cli.serve_options import ServeOptions
from baton.cli.supervisor import Addresses
from baton.cpus import parse_cpus
from baton.errors import ConfigError

runner = CliRunner()
ADDRESSES = Addresses("127.0.0.1:8100", "127.0.0.1:50100")


def flags_of(argv: tuple[str, ...]) -> dict[str, str]:
    """`--name value` pairs."""
    return dict(itertools.pairwise(argv))


def test_the_plan_starts_one_conductor_and_the_workers() -> None:
    options = ServeOptions(prefill=2, decode=3, port=0, grpc_port=7, block_size=16, verify="full")
    plan = make_plan(options, Path("/models/m"), {"A": "b"})
    conductor = plan.conductor(None)
    assert conductor.argv[1:3] == ("-m", "conductor")
    assert flags_of(conductor.argv)["--port"] == "0"
    assert flags_of(conductor.argv)["--grpc-port"] == "7"
    assert flags_of(conductor.argv)["--drain-timeout"] == "30.0"
    assert "--announce" in conductor.argv
    workers = plan.workers(ADDRESSES)
    assert [spec.name for spec in workers] == [
        *("prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2")
    ]
    for spec in workers:
        flags = flags_of(spec.argv)
        assert flags["-m"] == f"{spec.name.split('-')[0]}_worker"
        assert flags["--conductor"] == ADDRESSES.grpc
        assert flags["--model"] == "/models/m"
        assert (flags["--block-size"], flags["--verify"]) == ("16", "full")
        assert parse_cpus(flags["--cpus"])
        assert "--threads" not in flags
        assert "--num-blocks" not in flags
        assert "--exit-with-parent" in spec.argv
        assert spec.environ == {"A": "b"}


def test_a_restarted_conductor_keeps_its_ports() -> None:
    plan = make_plan(ServeOptions(port=0, grpc_port=0), Path("m"), {})
    flags = flags_of(plan.conductor(ADDRESSES).argv)
    assert (flags["--port"], flags["--grpc-port"]) == ("8100", "50100")


def test_clusters_on_one_machine_keep_their_stores_apart() -> None:
    plan = make_plan(ServeOptions(store_memory_mib=8), Path("m"), {})
    names = [
        flags_of(plan.workers(Addresses(http, "127.0.0.1:1"))[0].argv)["--memory-name"]
        for http in ("127.0.0.1:8000", "127.0.0.1:8001", "127.0.0.1:8000")
    ]
    assert names[0] != names[1]
    assert names[0] == names[2]  # a store that was started again finds its blocks


def test_several_conductors_have_ports_in_a_row_and_share_the_workers() -> None:
    plan = make_plan(ServeOptions(conductors=3, port=8000, grpc_port=0), Path("m"), {})
    makers = (plan.conductor, *plan.more_conductors)
    flags = [flags_of(tuple(make(None).argv)) for make in makers]
    assert [each["--name"] for each in flags] == ["conductor-0", "conductor-1", "conductor-2"]
    assert [each["--port"] for each in flags] == ["8000", "8001", "8002"]
    assert [each["--grpc-port"] for each in flags] == ["0", "0", "0"]
    again = flags_of(tuple(makers[2](ADDRESSES).argv))
    assert (again["--port"], again["--grpc-port"]) == ("8100", "50100")
    more = (Addresses("127.0.0.1:8101", "127.0.0.1:50101"),)
    for spec in plan.workers(replace(ADDRESSES, more=more)):
        assert flags_of(tuple(spec.argv))["--conductor"] == "127.0.0.1:50100,127.0.0.1:50101"


def test_workers_and_the_store_have_ports_for_metrics_in_a_row() -> None:
    for first, expected in ((9100, ["9103", "9100", "9101", "9102"]), (0, ["0"] * 4)):
        options = ServeOptions(
            prefill=2, metrics_port=first, metrics_tls="server", store_memory_mib=8
        )
        workers = make_plan(options, Path("m"), {}).workers(ADDRESSES)
        assert [spec.name for spec in workers] == ["store-0", "prefill-0", "prefill-1", "decode-0"]
        assert [flags_of(spec.argv)["--metrics-port"] for spec in workers] == expected
        assert {flags_of(spec.argv)["--metrics-tls"] for spec in workers} == {"server"}


def test_redis_is_told_by_the_environment_where_nobody_else_can_read_it() -> None:
    environ = new_environ("redis://:secret@host:1")
    assert environ["BATON_REDIS"] == "redis://:secret@host:1"
    assert environ["BATON_CLUSTER_NAME"] != new_environ("redis://host:1")["BATON_CLUSTER_NAME"]
    assert "BATON_REDIS" not in new_environ()
    plan = make_plan(ServeOptions(redis="redis://:secret@host:1"), Path("m"), environ)
    assert not any("secret" in text for text in plan.conductor(None).argv)


def test_colocated_has_no_prefill_workers() -> None:
    plan = make_plan(ServeOptions(colocated=True, decode=2), Path("m"), {})
    assert [spec.name for spec in plan.workers(ADDRESSES)] == ["decode-0", "decode-1"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"colocated": True}, {"decode-0": "0-7"}),
        ({}, {"prefill-0": "0-3", "decode-0": "4-7"}),
        ({"prefill": 1, "decode": 3}, {"prefill-0": "0-1", "decode-2": "6-7"}),
        ({"prefill_cpus": "2"}, {"prefill-0": "2", "decode-0": "0-1,3-7"}),
        ({"prefill": 2, "prefill_cpus": "0-7"}, {"prefill-1": "4-7", "decode-0": "0-7"}),
        ({"prefill_cpus": "0", "decode_cpus": "1-7"}, {"prefill-0": "0", "decode-0": "1-7"}),
        ({"prefill": 8, "decode": 8}, {"prefill-7": "7", "decode-0": "0"}),
    ],
)
def test_workers_divide_the_cpus(flags: dict[str, Any], expected: dict[str, str]) -> None:
    placed = {name: cpus for _, name, cpus in place_workers(ServeOptions(**flags), range(8))}
    assert {name: placed[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"colocated": True}, ""),
        ({}, "0-3"),
        ({"prefill": 2, "decode": 2}, "0-3"),
        ({"prefill_cpus": "0-7", "decode_cpus": "2-5"}, "0-1,6-7"),
        ({"prefill": 8, "decode": 8}, ""),
    ],
)
def test_the_conductor_stays_off_the_cpus_that_decode(flags: dict[str, Any], expected: str) -> None:
    placed = place_workers(ServeOptions(**flags), range(8))
    assert place_conductor(placed) == expected


def test_cpus_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="CPU 9 cannot be used here; there are 0-7"):
        place_workers(ServeOptions(decode_cpus="0,9"), range(8))


def test_the_served_name() -> None:
    assert ServeOptions().served_name == "demo"
    assert ServeOptions(model="Qwen/Qwen3-0.6B").served_name == "Qwen3-0.6B"
    assert ServeOptions(model="/models/tiny/").served_name == "tiny"
    assert ServeOptions(model="x", model_name="mine").served_name == "mine"


def test_each_cluster_has_a_token_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATON_CLUSTER_TOKEN", raising=False)
    first, second = new_environ(), new_environ()
    assert len(first["BATON_CLUSTER_TOKEN"]) >= 32
    assert first["BATON_CLUSTER_TOKEN"] != second["BATON_CLUSTER_TOKEN"]
    monkeypatch.setenv("BATON_CLUSTER_TOKEN", "given")
    assert new_environ()["BATON_CLUSTER_TOKEN"] == "given"


def test_huge_pages_are_asked_for_unless_glibc_is_tuned_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert new_environ()["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert new_environ()["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


def test_serving_without_worker_for_prefill_needs_colocated() -> None:
    result = runner.invoke(main.app, ["serve", "--prefill", "0"])
    assert isinstance(result.exception, ConfigError)
    assert "--colocated" in result.exception.message


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = runner.invoke(main.app, ["serve", "--port", port])
    assert isinstance(result.exception, ConfigError)
    assert f"127.0.0.1:{port} is in use" in result.exception.message


def test_http_and_grpc_need_a_port_each() -> None:
    result = runner.invoke(main.app, ["serve", "--port", "8123", "--grpc-port", "8123"])
    assert isinstance(result.exception, ConfigError)
    assert "--port and --grpc-port are both 8123" in result.exception.message


def test_a_failing_system_call_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(main, "app", full)
    with pytest.raises(SystemExit, match="baton: No space left on device"):
        main.main()


def test_a_foreign_address_is_blamed_on_host() -> None:
    arguments = ["serve", "--host", "192.0.2.1", "--grpc-port", "0"]  # RFC 5737: nobody's
    result = runner.invoke(main.app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert result.exception.message.endswith("with --host")


def test_with_certificates_workers_are_told_the_port_that_is_for_them() -> None:
    options = ServeOptions(tls_cert="c", tls_key="k", tls_ca="a", store_memory_mib=8)
    plan = make_plan(options, Path("m"), {"BATON_SSL_CERTFILE": "of another cluster"})
    listening = replace(ADDRESSES, for_workers="127.0.0.1:50200")
    assert flags_of(plan.conductor(None).argv)["--internal-port"] == "0"
    assert flags_of(plan.conductor(listening).argv)["--internal-port"] == "50200"
    files = {"BATON_TLS_CERT": "c", "BATON_TLS_KEY": "k", "BATON_TLS_CA": "a"}
    for spec in (plan.conductor(None), *plan.workers(listening)):
        assert spec.environ == files
    for spec in plan.workers(listening):
        assert flags_of(spec.argv)["--conductor"] == "127.0.0.1:50200"
    assert plan.ssl_certfile == ""
    assert "--internal-port" not in make_plan(ServeOptions(), Path("m"), {}).conductor(None).argv


def test_workers_do_not_use_the_port_with_the_certificate_for_clients() -> None:
    plan = make_plan(ServeOptions(ssl_certfile="c", ssl_keyfile="k"), Path("m"), {})
    listening = replace(ADDRESSES, for_workers="127.0.0.1:50200")
    assert flags_of(plan.conductor(listening).argv)["--internal-port"] == "50200"
    for spec in plan.workers(listening):
        assert flags_of(spec.argv)["--conductor"] == "127.0.0.1:50200"
