"""Who may join the fleet: another protocol, model or layout is refused, with both sides named."""

from __future__ import annotations

import asyncio

import pytest

from baton import __version__
from baton.cli.status import refused_lines
from baton.errors import LayoutMismatch, ProtocolMismatch
from baton.rpc.codec_fleet import info_from_pb, info_to_pb
from baton.types.fleet import PROTOCOL, Role
from conductor.cluster import ConductorIdentity, describe_cluster
from conductor.fit import MOST, REMEMBER_S, check_fit
from tests.fake_worker import fake_cluster, layout, worker_info
from tests.virtual_time import virtual_time

IDENTITY = ConductorIdentity("c", 1, "i", "h:1", "g:1", 0.0)
LIVE = worker_info("decode-0", Role.DECODE)


def test_the_same_again_may_join() -> None:
    joining = info_from_pb(info_to_pb(worker_info("prefill-0", Role.PREFILL)))
    check_fit(joining, [LIVE], LIVE.layout.model)
    check_fit(joining, [], None)


@pytest.mark.parametrize("role", list(Role))
def test_another_protocol_is_refused(role: Role) -> None:
    newer = worker_info("new", role, protocol=PROTOCOL + 1, version="9.9.9")
    with pytest.raises(ProtocolMismatch) as refusal:
        check_fit(newer, [LIVE], None)
    kind = "store" if role is Role.STORE else f"{role} worker"
    for part in (f"{kind} new", "9.9.9", f"protocol {PROTOCOL + 1}", __version__):
        assert part in refusal.value.message


def test_who_says_no_protocol_is_older() -> None:
    """From before the field: protobuf reads 0 and an empty version."""
    message = info_to_pb(worker_info("old", Role.DECODE))
    message.ClearField("protocol")
    message.ClearField("version")
    with pytest.raises(ProtocolMismatch, match="an older version"):
        check_fit(info_from_pb(message), [], None)


def test_another_model_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match="the same model"):
        check_fit(LIVE, [], "another-fingerprint")


def test_another_layout_than_that_of_live_workers_is_refused() -> None:
    other = worker_info("decode-1", Role.DECODE, layout=layout(block_size=64))
    with pytest.raises(LayoutMismatch, match=r"decode-1.*decode-0") as refusal:
        check_fit(other, [LIVE], LIVE.layout.model)
    assert "block_size=64" in refusal.value.message
    assert f"block_size={LIVE.layout.block_size}" in refusal.value.message
    assert "dtype" not in refusal.value.message  # in which they do not differ


def test_a_worker_may_come_back_under_its_name_with_another_layout() -> None:
    """Alone, as when the settings of a whole cluster are changed."""
    check_fit(worker_info("decode-0", Role.DECODE, layout=layout(block_size=64)), [LIVE], None)


@virtual_time
async def test_operators_see_who_was_refused_of_late(caplog: pytest.LogCaptureFixture) -> None:
    async with fake_cluster() as cluster:
        fleet, other = cluster.conductor.fleet, layout(block_size=64)

        def seen() -> list[tuple[str, str]]:
            told = describe_cluster(cluster.conductor, IDENTITY)
            lines = [line.plain for line in refused_lines(told)]
            assert all(line.startswith("refused: decode worker new") for line in lines)
            return [(each["name"], each["reason"]) for each in told["refused"]]

        assert not seen()
        for number in (*range(MOST + 3), MOST):
            misfit = worker_info(f"new-{number}", Role.DECODE, layout=other)
            with pytest.raises(LayoutMismatch):
                await fleet.register(misfit)
        assert len(seen()) == MOST
        assert "block_size=64" in seen()[-1][1]
        assert caplog.text.count(f": decode worker new-{MOST} ") == 1
        await fleet.register(worker_info(f"new-{MOST}", Role.DECODE))
        assert len(seen()) == MOST - 1
        await asyncio.sleep(REMEMBER_S)
        assert not seen()
