"""What the user wants to do here; most of it is not asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wanted:
    store_dir: str = ""  # of a store's NVMe tier; empty: none
    redis: bool = False
    ports: tuple[int, ...] = (8000, 50051)
    certificates: bool = False  # the variables of the processes name some
