"""Tests in this directory need a CUDA GPU and compiled Triton kernels."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU on this machine")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 is set: unset it to compile the kernels")
