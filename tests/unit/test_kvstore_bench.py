"""The store's benchmark at toy size: everything is measured, named and written."""

from __future__ import annotations

import io
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from kvstore import bench, bench_tiers


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_small_run_reports_every_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_tiers, "INDEXED", 200)
    monkeypatch.setattr(bench_tiers, "LOOKUPS", 5)
    bench.main(
        tmp_path,
        json=str(tmp_path / "result.json"),
        block_kib="64,256",
        total_mib=8,
        rounds=1,
        threads=2,
        direct=False,
        shm=tmp_path,
    )
    report = orjson.loads((tmp_path / "result.json").read_bytes())
    results = report["results"]
    assert {(r["tier"], r["operation"], r["block_kib"]) for r in results} == {
        (tier, operation, kib)
        for tier, operations in (("cpu", ("put", "put+seal", "get")), ("nvme", ("put", "get")))
        for operation in operations
        for kib in (64, 256)
    }
    assert all(r["store_gbps"] > 0 and r["limit_gbps"] > 0 and r["ratio"] > 0 for r in results)
    assert [index["tier"] for index in report["indexes"]] == ["cpu", "nvme"]
    assert "nvme" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_the_tables_have_a_row_for_each_result() -> None:
    result = bench_tiers.TierResult("cpu", "put", 64, 10, 8.0, 10.0, 0.8)
    index = bench_tiers.IndexResult("nvme", 1e6, 24.4)
    console = Console(file=io.StringIO(), record=True, width=100)
    console.print(bench.table([result], 8, 1), bench.index_table([index]))
    text = console.export_text()
    assert "80%" in text
    assert "1.00" in text
