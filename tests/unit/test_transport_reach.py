"""What transports listen at, where all peers are on this machine: loopback, and nothing else."""

from __future__ import annotations

import os

import pytest

from baton.kv.transport import reach
from baton.kv.transport.nccl_group import join_store, make_store
from baton.kv.transport.reach import UCX_DEVICES, is_loopback, keep_ucx_here
from baton.kv.transport.registry import available, make_transport
from tests.listening import tcp_ports

USABLE = {transport.name for transport in available() if transport.usable}


@pytest.mark.parametrize("name", ["nixl", "nccl", "shm"])
async def test_it_listens_at_loopback_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in USABLE:
        pytest.skip(f"{name} does not work here")
    monkeypatch.delenv(UCX_DEVICES, raising=False)
    before = tcp_ports([os.getpid()])
    transport = make_transport(name, "w", host="127.0.0.1")
    await transport.start()
    try:
        transport.allocate(1 << 16)
        opened = tcp_ports([os.getpid()]) - before
        assert all(port.is_loopback for port in opened), opened
        assert len(opened) <= 1
    finally:
        await transport.close()


def test_the_rendezvous_listens_where_it_is_told() -> None:
    before = tcp_ports([os.getpid()])
    store = make_store("127.0.0.1")
    (opened,) = tcp_ports([os.getpid()]) - before
    assert (opened.host, opened.port) == ("127.0.0.1", store.port)
    join_store("127.0.0.1", store.port).set("a", "b")
    assert store.get("a") == b"b"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("[::1]", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("worker-0.example.com", False),
    ],
)
def test_which_hosts_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_what_the_administrator_chose_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_interfaces", lambda: ["eth0", "eth1"])
    monkeypatch.setenv(UCX_DEVICES, "mlx5_0:1")
    keep_ucx_here()
    assert os.environ[UCX_DEVICES] == "mlx5_0:1"
    monkeypatch.delenv(UCX_DEVICES)
    keep_ucx_here()
    assert os.environ[UCX_DEVICES] == "^eth0,eth1"
    monkeypatch.delenv(UCX_DEVICES)
    monkeypatch.setattr(reach, "_interfaces", list)
    keep_ucx_here()
    assert UCX_DEVICES not in os.environ
