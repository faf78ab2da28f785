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

SHARED_KIB = {80: 163, 86: 99, 90: 227}
"""Of one program (CUDA C++ Programming Guide, technical specifications)."""


@pytest.mark.timeout(220)  # 15 s on a quiet core; machines of CI are not quiet
def test_the_kernels_compile_for_real_gpus_and_fit_them(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels_compile"],
        env=environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert Counter(row["kernel"] for row in compiled) == {
        "_attend_tiles": 10,
        "_attend_splits": 10,
        "_join_splits": 1,
        "_write_tokens": 1,
        "_copy_blocks": 1,
    }
    assert not [row for row in compiled if row["shared"] > SHARED_KIB[row["arch"]] * 1024]
