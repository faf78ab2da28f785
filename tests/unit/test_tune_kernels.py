"""The tuner's choice and the table that it writes; what it measures needs a GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from baton.kernels import tile_table
from baton.kernels.tile_table import Tile
from baton.kernels.tiles import architecture
from tools.tune_kernels import best_tile, decode_tiles, prefill_tiles, rewritten

A, B, C = Tile(16, 32, 4, 2), Tile(16, 64, 4, 2), Tile(16, 128, 4, 2)


def test_the_best_on_the_whole_wins_and_must_run_everywhere() -> None:
    times: list[dict[Tile, float | None]] = [{A: 1.0, B: 1.2, C: 0.9}, {A: 9.0, B: 4.0, C: None}]
    tile, score = best_tile([A, B, C], [row.get for row in times])
    assert tile == B
    assert score == pytest.approx((1.2 / 0.9) ** 0.5)
    with pytest.raises(SystemExit, match="no candidate ran"):
        best_tile([C], [row.get for row in times])


def test_the_written_table_differs_in_one_architecture_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(tile_table.__file__).read_text(encoding="utf-8")
    found = {"PREFILL": {128: Tile(64, 32, 4, 4)}, "DECODE": {128: Tile(16, 128, 2, 2, 6)}}
    text = rewritten(source, 90, found, "some GPU")
    (tmp_path / "written_tile_table.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    written = vars(importlib.import_module("written_tile_table"))
    tables = {"PREFILL": tile_table.PREFILL, "DECODE": tile_table.DECODE}
    for name, table in tables.items():
        assert written[name].keys() == table.keys()
        for key, tile in table.items():
            expected = found[name][128] if key == (90, 128) else tile
            assert str(written[name][key]) == str(expected)
    assert written["SOURCES"] == {**tile_table.SOURCES, 90: "some GPU"}


def test_writing_what_stands_there_changes_nothing() -> None:
    source = Path(tile_table.__file__).read_text(encoding="utf-8")
    same = rewritten(source, 80, {"PREFILL": {}, "DECODE": {}}, tile_table.SOURCES[80])
    assert {line.strip() for line in same.splitlines()} >= {
        line.strip() for line in source.splitlines() if "Tile(" in line
    }


def test_candidates_are_different_tiles() -> None:
    for candidates in (list(prefill_tiles()), list(decode_tiles())):
        assert len(set(candidates)) == len(candidates) > 20


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), 80), ((8, 6), 89), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((12, 0), 89)],
)
def test_architectures(capability: tuple[int, int], arch: int) -> None:
    assert architecture(capability) == arch
