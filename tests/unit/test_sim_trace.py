"""Traces of the simulator: read, written, scaled, replayed unevenly, and what is in them."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ConfigError
from sim.workload.__main__ import main
from sim.workload.statistics import lru_hits, statistics
from sim.workload.trace import LoadCurve, Request, blocks_of, read_trace, scaled, trace_line

ROWS = [
    {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 2, 3]},
    {"timestamp": 6000, "input_length": 1500, "output_length": 1},
]


def lines(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_trace_begins_at_0_with_arrivals_spread_and_ids_for_all_blocks(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    data = lines(ROWS) + b"\n"
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    requests = read_trace(path)
    assert [r.blocks for r in requests] == [(0, 1), (0, 2, 3), (4, 5, 6)]
    first, second, third = (r.at_s for r in requests)
    assert first == 0
    assert 0 < second < 3
    assert 0 < third - second < 6
    assert requests == read_trace(path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "no JSON object"),
        (b'{"timestamp": "soon", "input_length": 1, "output_length": 1}', "timestamp"),
        (b'{"timestamp": 1, "output_length": 1}', "input_length is None"),
        (b'{"timestamp": 1, "input_length": 1, "output_length": 0}', "output_length is 0"),
        (b'{"timestamp": 1, "input_length": 1, "output_length": true}', "output_length is True"),
        (
            b'{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}',
            "2 hash_ids for 9 tokens",
        ),
        (
            b'{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": ["a"]}',
            "hash_ids is no list of integers",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: bytes, says: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(lines(ROWS) + row)
    with pytest.raises(ConfigError, match=rf"trace\.jsonl, line 4: .*{says}"):
        read_trace(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "half.gz"
    broken.write_bytes(gzip.compress(lines(ROWS))[:-9])
    for path in (tmp_path / "missing", tmp_path, broken):
        with pytest.raises(ConfigError, match=path.name):
            read_trace(path)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    requests = [
        Request(0.0, 600, 3, (7, 8)),
        Request(1.0625, 512, 4, (7,), tenant="a", priority=-2),
    ]
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"".join(map(trace_line, requests)))
    assert read_trace(path) == requests


def test_times_that_all_differ_are_not_spread(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(lines([ROWS[0] | {"timestamp": at} for at in (0, 1, 5000)]))
    assert [r.at_s for r in read_trace(path)] == [0, 0.001, 5]


tokens = st.integers(1, 20_000)


@given(tokens, tokens, tokens, st.floats(0.05, 8))
def test_scaled_prompts_share_the_same_part(one: int, two: int, common: int, scale: float) -> None:
    """Prompts that begin with `common` equal tokens still do, to the block, and are else apart."""
    shared = min(one, two, common) // 512
    first = Request(0.0, one, 1, tuple(range(blocks_of(one))))
    others = tuple(range(1000, 1000 + blocks_of(two) - shared))
    second = Request(0.0, two, 1, (*range(shared), *others))
    a, b = scaled([first, second], input_scale=scale)
    for request, tokens in ((a, one), (b, two)):
        assert request.input_tokens == max(1, round(tokens * scale))
        assert len(request.blocks) == blocks_of(request.input_tokens)
        assert len(set(request.blocks)) == len(request.blocks)
    common_now = [x == y for x, y in zip(a.blocks, b.blocks, strict=False)]
    if others and shared < blocks_of(one):
        assert sum(common_now) == pytest.approx(shared * scale, abs=1)
    assert not any(later and not earlier for earlier, later in pairwise(common_now))
    assert len(set(a.blocks) & set(b.blocks)) == sum(common_now)


def test_scaling_changes_times_and_answers() -> None:
    (request,) = scaled([Request(10.0, 100, 8, (5,))], speed=2, output_scale=0.01)
    assert request == Request(5.0, 100, 1, (5,))


def test_load_changes_with_time() -> None:
    curve = LoadCurve.parse("0:1,10:2,20:0.5")
    requests = [Request(at, 1, 1, (0,)) for at in (0.0, 10.0, 12.0, 30.0, 31.0)]
    assert [r.at_s for r in curve.applied(requests)] == [0, 10, 11, 20, 22]
    assert list(LoadCurve.parse("0:1").applied(requests)) == requests


@pytest.mark.parametrize("text", ["", "1", "5:1", "0:1,0:2", "0:0", "0:1:2", "0:nan"])
def test_other_load_curves_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="load"):
        LoadCurve.parse(text)


def requests_of(*prompts: tuple[int, ...]) -> list[Request]:
    return [Request(float(n), 512 * len(ids), 1, ids) for n, ids in enumerate(prompts)]


def test_a_cache_drops_what_was_not_used_for_longest() -> None:
    requests = requests_of((1, 2), (1, 3), (2,), (1,))
    assert lru_hits(requests, 2) == 1  # 2 goes for 3, then 1 for 2
    assert lru_hits(requests, 3) == 3


def test_statistics_count_what_is_there() -> None:
    requests = [*requests_of((1, 2), (1, 3), (1, 2)), Request(120.0, 700, 9, (1, 4))]
    found = statistics(requests, capacities=(2,))
    assert (found.requests, found.duration_s, found.distinct_blocks) == (4, 120.0, 4)
    assert found.peak_rate == 3 / 60
    assert (found.input_tokens.max, found.output_tokens.mean) == (1024, 3)
    assert [(c.capacity_blocks, c.hit_share) for c in found.caches] == [(2, 3 / 8), (None, 4 / 8)]
    assert found.full_hit_share == 4 / 7


def test_the_command_makes_scales_and_counts(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path, half = tmp_path / "made.jsonl", tmp_path / "half.jsonl"
    main(["make", "prefixes", "--requests", "50", "--levels", "2", "--node-tokens", "1024"])
    path.write_bytes(capfdbinary.readouterr().out)
    main(["scale", str(path), "--first", "40", "--input-scale", "0.5", "--load", "0:1,5:2"])
    half.write_bytes(capfdbinary.readouterr().out)
    assert (len(read_trace(path)), len(read_trace(half))) == (50, 40)
    main(["stats", str(half), "--json", "--capacity", "10,20"])
    found = json.loads(capfdbinary.readouterr().out)
    assert found["requests"] == 40
    assert [cache["capacity_blocks"] for cache in found["caches"]] == [10, 20, None]
    main(["stats", str(half)])
    assert b"prompt tokens" in capfdbinary.readouterr().out
    with pytest.raises(SystemExit, match="missing"):
        main(["stats", str(tmp_path / "missing")])
