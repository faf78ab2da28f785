"""The Triton kernels compile to machine code for real GPUs, and fit them. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (the extras cuda and dev have it)")

SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227}
"""Of one program (CUDA C++ Programming Guide, technical specifications). A multiprocessor has 1 KiB
more, and every program takes 1 KiB more than it asks for."""


@pytest.mark.timeout(320)  # 30 s on a quiet core; machines of CI are not quiet
def test_the_kernels_compile_for_real_gpus_and_fit_them(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels_compile"],
        env=environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert Counter(row["kernel"] for row in compiled) == {
        "_attend_tiles": 16,
        "_attend": 15,
        "_norm_rows": 4,
        "_silu_mul": 2,
        "_norm_rope_write": 4,
        "_best_of_chunk": 2,
        "_best_of_row": 2,
        "_write_tokens": 2,
        "_copy_blocks": 2,
    }
    for row in compiled:
        limit = SHARED_KIB[row["arch"]] * 1024
        assert row["shared"] <= limit, row
        if row["kernel"] == "_attend":
            assert row["ordered"], "partial results are counted before they are stored"
            assert (row["shared"] + 1024) * row["resident"] <= limit + 1024, row
