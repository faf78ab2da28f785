"""`python -m kvstore.bench`: the store's tiers next to a memory copy and the raw disk."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from baton.bench.origin import origin
from kvstore.bench_tiers import (
    DiskBench,
    IndexResult,
    MemoryBench,
    Place,
    TierResult,
    measure_indexes,
)


def main(
    directory: Annotated[
        Path, typer.Option("--dir", help="On the disk to measure; a directory is made in it.")
    ] = Path(),
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write it there; - = stdout.")
    ] = None,
    block_kib: Annotated[str, typer.Option(help="Block sizes, KiB, by commas.")] = (
        "64,256,1024,4096"
    ),
    total_mib: Annotated[int, typer.Option(min=8, help="MiB of blocks in each round.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; rates are their medians.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="For the disk.")] = 8,
    direct: Annotated[bool, typer.Option(help="O_DIRECT where the file system has it.")] = True,
    shm: Annotated[Path, typer.Option(help="Where shared memory is.")] = Path("/dev/shm"),
) -> None:
    """Put and get blocks in each tier of a store."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="kvstore-bench-") as name:
        place = Place(shm, Path(name), direct, threads)
        sizes = [int(size) for size in block_kib.split(",")]
        tiers, indexes = asyncio.run(measure(place, sizes, total_mib, rounds))
    if json is not None:
        report = as_json(place, total_mib, rounds, tiers, indexes)
        if json == "-":
            sys.stdout.buffer.write(report)
        else:
            Path(json).write_bytes(report)
    if json != "-":
        Console().print(table(tiers, total_mib, rounds), index_table(indexes))


async def measure(
    place: Place, sizes: list[int], total_mib: int, rounds: int
) -> tuple[list[TierResult], list[IndexResult]]:
    tiers: list[TierResult] = []
    for kib in sizes:
        tiers += await MemoryBench(place, kib, (total_mib << 10) // kib).rounds(rounds)
    for kib in sizes:
        tiers += await DiskBench(place, kib, (total_mib << 10) // kib).rounds(rounds)
    return tiers, await measure_indexes(place)


def as_json(
    place: Place,
    total_mib: int,
    rounds: int,
    tiers: list[TierResult],
    indexes: list[IndexResult],
) -> bytes:
    """The report with what is needed to repeat it."""
    report: dict[str, Any] = {
        **origin("store", "python", "-m", "kvstore.bench", *sys.argv[1:]),
        "total_mib": total_mib,
        "rounds": rounds,
        "disk": {"threads": place.threads, "direct": place.direct},
        "results": [asdict(result) for result in tiers],
        "indexes": [asdict(result) for result in indexes],
    }
    return orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def table(results: list[TierResult], total_mib: int, rounds: int) -> Table:
    drawn = Table(title=f"KV store, {total_mib} MiB per round, {rounds} rounds, GB/s")
    for column in ("tier", "operation"):
        drawn.add_column(column)
    for column in ("block KiB", "store", "limit", "store/limit"):
        drawn.add_column(column, justify="right")
    for r in results:
        drawn.add_row(
            r.tier,
            r.operation,
            str(r.block_kib),
            f"{r.store_gbps:.2f}",
            f"{r.limit_gbps:.2f}",
            f"{r.ratio:.0%}",
        )
    drawn.caption = "limit: a memory copy; sequential writes and random reads of a plain file"
    return drawn


def index_table(results: list[IndexResult]) -> Table:
    drawn = Table(title="Indexes")
    drawn.add_column("tier")
    for column in ("million keys/s", "bytes/block"):
        drawn.add_column(column, justify="right")
    for r in results:
        drawn.add_row(r.tier, f"{r.lookups_per_s / 1e6:.2f}", f"{r.bytes_per_block:.0f}")
    return drawn


if __name__ == "__main__":
    typer.run(main)
