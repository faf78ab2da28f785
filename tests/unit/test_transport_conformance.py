"""What every transport promises (baton.kv.transport.base), run against each of them."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from baton.errors import ConfigError, TransportError
from baton.kv.transport.base import Copy
from baton.kv.transport.loopback import LoopbackFabric
from baton.kv.transport.registry import NAMES, available, make_transport
from tests.unit.transport_kit import POOL, TransportPair, pattern, transport_pair, view

pytestmark = pytest.mark.parametrize("name", NAMES)


async def read(pair: TransportPair, *copies: Copy) -> None:
    with pair.source.serving("reader/1"):
        async with asyncio.timeout(20):
            await pair.reader.read("source/1", copies).wait()


async def test_scattered_copies_arrive_and_nothing_else_changes(name: str) -> None:
    async with transport_pair(name) as pair:
        pair.local[:] = 7
        expected = pair.local.copy()
        copies = [Copy(4096, 0, 100), Copy(0, 8192, 4096), Copy(POOL - 5, POOL - 5, 5)]
        for c in copies:
            expected[c.local : c.local + c.length] = pair.remote[c.remote : c.remote + c.length]
        await read(pair, *copies)
        assert np.array_equal(pair.local, expected)


async def test_paged_copies_of_one_size(name: str) -> None:
    async with transport_pair(name) as pair:
        unit = 16384
        order = np.random.default_rng(0).permutation(POOL // unit)
        copies = [Copy(int(r) * unit, n * unit, unit) for n, r in enumerate(order)]
        await read(pair, *copies)
        expected = pair.remote.reshape(-1, unit)[order].reshape(-1)
        assert np.array_equal(pair.local, expected)
        pair.remote[:] ^= 0xFF  # a second read sees what is there by then
        await read(pair, Copy(0, 0, 2 * unit), Copy(3 * unit, 2 * unit, unit))
        assert np.array_equal(pair.local[: 2 * unit], pair.remote[: 2 * unit])


async def test_a_read_larger_than_any_slice(name: str) -> None:
    size = 20 << 20
    async with transport_pair(name, pool=size) as pair:
        await read(pair, Copy(0, 0, size - 3))
        assert np.array_equal(pair.local[: size - 3], pair.remote[: size - 3])


async def test_many_reads_at_once(name: str) -> None:
    async with transport_pair(name) as pair:
        with pair.source.serving("reader/1"), pair.source.serving("reader/1"):
            transfers = [
                pair.reader.read("source/1", [Copy(n * 8192, n * 8192, 8192)]) for n in range(64)
            ]
            async with asyncio.timeout(20):
                await asyncio.gather(*(t.wait() for t in transfers))
        assert np.array_equal(pair.local[: 64 * 8192], pair.remote[: 64 * 8192])


@pytest.mark.parametrize(
    "copy",
    [Copy(POOL, 0, 1), Copy(0, POOL - 1, 2), Copy(-1, 0, 1), Copy(0, 0, 0), Copy(0, -4, 4)],
)
async def test_a_range_outside_of_a_pool_is_refused_at_once(name: str, copy: Copy) -> None:
    async with transport_pair(name) as pair:
        with pytest.raises(TransportError):
            pair.reader.read("source/1", [copy])


async def test_strangers_and_former_peers_are_refused(name: str) -> None:
    async with transport_pair(name) as pair:
        with pytest.raises(TransportError, match="stranger"):
            pair.reader.read("stranger/1", [Copy(0, 0, 1)])
        await pair.reader.disconnect("source/1")
        await pair.reader.disconnect("source/1")
        with pytest.raises(TransportError):
            pair.reader.read("source/1", [Copy(0, 0, 1)])


async def test_a_bad_endpoint_is_a_transport_error(name: str) -> None:
    async with transport_pair(name) as pair:
        for endpoint in (b"", b"nonsense", b"\xff\x00"):
            with pytest.raises(TransportError, match="other/1"):
                await pair.reader.connect("other/1", endpoint)


async def test_connecting_again_replaces_the_connection(name: str) -> None:
    async with transport_pair(name) as pair:
        await pair.source.connect("reader/1", pair.reader.endpoint())
        with pair.source.serving("reader/1"):
            await pair.reader.connect("source/1", pair.source.endpoint())
        await read(pair, Copy(0, 0, 64))
        assert np.array_equal(pair.local[:64], pair.remote[:64])


async def test_after_abort_memory_is_not_written(name: str) -> None:
    size = 64 << 20
    async with transport_pair(name, pool=size) as pair:
        with pair.source.serving("reader/1"):
            transfer = pair.reader.read("source/1", [Copy(0, 0, size)])
            waiting = asyncio.create_task(transfer.wait())
            await asyncio.sleep(0)
            async with asyncio.timeout(20):
                await transfer.abort()
            pair.local[:] = 0
            await asyncio.sleep(0.02)
            assert not pair.local.any()
            await asyncio.wait([waiting])
            if (error := waiting.exception()) is not None:
                assert isinstance(error, TransportError)
            await transfer.abort()  # harmless after the end


async def test_cancelling_wait_does_not_stop_the_transfer(name: str) -> None:
    async with transport_pair(name) as pair:
        with pair.source.serving("reader/1"):
            transfer = pair.reader.read("source/1", [Copy(0, 0, POOL)])
            waiting = asyncio.create_task(transfer.wait())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            async with asyncio.timeout(20):
                await transfer.wait()
        assert np.array_equal(pair.local, pair.remote)


async def test_close_ends_transfers_and_is_idempotent(name: str) -> None:
    async with transport_pair(name) as pair:
        with pair.source.serving("reader/1"):
            transfer = pair.reader.read("source/1", [Copy(0, 0, POOL)])
            async with asyncio.timeout(20):
                await pair.reader.close()
                await transfer.abort()
            await pair.reader.close()


async def test_pools_are_zeroed_and_made_once(name: str) -> None:
    async with transport_pair(name) as pair:
        assert not pair.local.any()
        with pytest.raises(Exception, match="one pool"):
            pair.reader.allocate(POOL)


async def test_a_pool_in_a_file_keeps_its_contents(name: str, tmp_path: Path) -> None:
    backing = tmp_path / "pool"
    for start in range(2):
        source = make_transport(name, f"source{start}", fabric=LoopbackFabric())
        await source.start()
        try:
            pool = view(source.allocate(POOL, backing=backing))
            assert pool.any() == bool(start)
            assert not start or np.array_equal(pool, pattern(POOL, 1))
            pool[:] = pattern(POOL, 1)
            other = make_transport("shm", "other")
            with pytest.raises(ConfigError, match="in use"):
                other.allocate(POOL, backing=backing)
            del pool
        finally:
            await source.close()
    assert backing.stat().st_mode & 0o777 == 0o600


async def test_a_pool_in_a_file_is_refused_where_there_is_no_room(
    name: str, tmp_path: Path
) -> None:
    transport = make_transport(name, "source", fabric=LoopbackFabric())
    await transport.start()
    try:
        with pytest.raises(ConfigError, match="cannot be used"):
            transport.allocate(POOL, backing=tmp_path / "none" / "pool")
        with pytest.raises(ConfigError, match="cannot be used"):
            transport.allocate(1 << 60, backing=tmp_path / "pool")
    finally:
        await transport.close()


async def test_a_backed_pool_serves_others(name: str, tmp_path: Path) -> None:
    fabric = LoopbackFabric()
    reader, source = (make_transport(name, worker, fabric=fabric) for worker in ("r", "s"))
    for transport in (reader, source):
        await transport.start()
    try:
        local = view(reader.allocate(POOL))
        view(source.allocate(POOL, backing=tmp_path / "pool"))[:] = pattern(POOL, 2)
        await source.connect("r/1", reader.endpoint())
        with source.serving("r/1"):
            await reader.connect("s/1", source.endpoint())
            async with asyncio.timeout(20):
                await reader.read("s/1", [Copy(0, 0, POOL)]).wait()
        assert np.array_equal(local, pattern(POOL, 2))
    finally:
        await reader.close()
        await source.close()


async def test_it_is_announced_by_name(name: str) -> None:
    async with transport_pair(name) as pair:
        assert pair.reader.name == name
        assert {a.name: a.usable for a in available()}[name]


async def test_unknown_names_and_devices(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make_transport(f"no-{name}", "worker")
    async with transport_pair(name):
        other = make_transport("shm", "worker")
        with pytest.raises(ConfigError, match="cuda"):
            other.allocate(4096, "cuda:0")


def sizes(*parts: object) -> dict[str, int]:
    """Of all collections that these objects own."""
    kinds = (dict, set, list, deque)
    return {n: len(v) for part in parts for n, v in vars(part).items() if isinstance(v, kinds)}


async def test_peers_that_die_and_come_again_leave_nothing(name: str) -> None:
    """Each life has another name, so whatever is kept by peer would pile up."""
    fabric = LoopbackFabric()
    reader = make_transport(name, "reader", fabric=fabric)
    await reader.start()
    view(reader.allocate(POOL))
    found = []
    for life in range(4):
        source, key = make_transport(name, f"source-{life}", fabric=fabric), f"source/{life}"
        await source.start()
        view(source.allocate(POOL))
        await source.connect("reader/1", reader.endpoint())
        with source.serving("reader/1"):
            await reader.connect(key, source.endpoint())
            async with asyncio.timeout(20):
                await reader.read(key, [Copy(0, 0, 8192), Copy(16384, 8192, 4096)]).wait()
        if life % 2:  # it dies while something is read
            late = reader.read(key, [Copy(0, 0, POOL)])
        await source.close()
        await reader.disconnect(key)
        if life % 2:
            async with asyncio.timeout(20):
                await late.abort()
        found.append(sizes(reader, getattr(reader, "_thread", reader)))
    await reader.close()
    assert found == [found[0]] * 4
