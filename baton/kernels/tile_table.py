"""The stored tiles of the attention kernels, by architecture and padded head size.

Written by `python -m tools.tune_kernels`, one architecture at a time, on a GPU of it; rows whose
`source` is "estimate" have not been measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int  # query rows (tokens x heads of a group) of one program; decode raises it to fit
    keys: int  # K and V tokens of one step of its loop
    num_warps: int
    num_stages: int
    programs: int = 1  # decode: programs of its grid per multiprocessor


SOURCES: dict[int, str] = {80: "estimate", 89: "estimate", 90: "estimate", 100: "estimate"}

# (architecture, head_pad), for two-byte types
PREFILL: dict[tuple[int, int], Tile] = {
    (80, 64): Tile(rows=128, keys=64, num_warps=4, num_stages=3),
    (80, 128): Tile(rows=128, keys=64, num_warps=8, num_stages=3),
    (80, 256): Tile(rows=64, keys=32, num_warps=8, num_stages=3),
    (89, 64): Tile(rows=128, keys=64, num_warps=8, num_stages=3),
    (89, 128): Tile(rows=64, keys=32, num_warps=4, num_stages=3),
    (89, 256): Tile(rows=64, keys=32, num_warps=8, num_stages=2),
    (90, 64): Tile(rows=128, keys=128, num_warps=8, num_stages=3),
    (90, 128): Tile(rows=128, keys=64, num_warps=8, num_stages=3),
    (90, 256): Tile(rows=128, keys=32, num_warps=8, num_stages=3),
    (100, 64): Tile(rows=128, keys=128, num_warps=8, num_stages=3),
    (100, 128): Tile(rows=128, keys=64, num_warps=8, num_stages=3),
    (100, 256): Tile(rows=128, keys=32, num_warps=8, num_stages=3),
}

DECODE: dict[tuple[int, int], Tile] = {
    (80, 64): Tile(rows=16, keys=64, num_warps=4, num_stages=3, programs=4),
    (80, 128): Tile(rows=16, keys=64, num_warps=4, num_stages=3, programs=2),
    (80, 256): Tile(rows=16, keys=32, num_warps=4, num_stages=3, programs=2),
    (89, 64): Tile(rows=16, keys=64, num_warps=4, num_stages=3, programs=2),
    (89, 128): Tile(rows=16, keys=32, num_warps=4, num_stages=3, programs=2),
    (89, 256): Tile(rows=16, keys=32, num_warps=4, num_stages=2, programs=2),
    (90, 64): Tile(rows=16, keys=64, num_warps=4, num_stages=3, programs=4),
    (90, 128): Tile(rows=16, keys=64, num_warps=4, num_stages=3, programs=3),
    (90, 256): Tile(rows=16, keys=32, num_warps=4, num_stages=3, programs=2),
    (100, 64): Tile(rows=16, keys=64, num_warps=4, num_stages=3, programs=4),
    (100, 128): Tile(rows=16, keys=64, num_warps=4, num_stages=3, programs=3),
    (100, 256): Tile(rows=16, keys=32, num_warps=4, num_stages=3, programs=2),
}
