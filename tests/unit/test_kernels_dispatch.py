"""Which kernels a device gets, and what a user reads where it cannot work."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from baton.errors import ConfigError
from baton.kernels import jit, reference, tiles
from baton.kernels.dispatch import kernels_for


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter without TRITON_INTERPRET."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cpu_gets_the_reference_without_importing_triton() -> None:
    assert kernels_for("cpu").attention_prefill is reference.attention_prefill
    assert kernels_for("cpu", "reference").name == "reference"
    code = (
        "import sys\n"
        "from baton.kernels.dispatch import kernels_for\n"
        "print(kernels_for('cpu').name, 'triton' in sys.modules)"
    )
    assert run_python(code).split() == ["reference", "False"]


def test_every_module_imports_without_triton_and_the_error_says_what_to_do() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import baton.kernels.attention_decode, baton.kernels.attention_prefill\n"
        "import baton.kernels.kv_copy, baton.kernels.tiles, baton.kernels.rows\n"
        "import baton.kernels.sampling, baton.kernels.flash\n"
        "from baton.errors import ConfigError\n"
        "from baton.kernels.dispatch import kernels_for\n"
        "try:\n"
        "    kernels_for('cuda')\n"
        "except ConfigError as error:\n"
        "    print(error.message)"
    )
    assert "pip install 'baton-llm[cuda]'" in run_python(code)


def test_unknown_kernels_are_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="choose one of reference, triton"):
        kernels_for("cpu", "cutlass")


def test_flash_needs_a_gpu_and_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"need torch 2\.13 or newer"):
        kernels_for("cuda", "flash")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="need a CUDA GPU, and the device is 'cpu'"):
        kernels_for("cpu", "flash")


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "triton", object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="cannot run on device 'cpu'"):
        jit.require_triton("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    jit.require_triton("cpu")


def test_a_gpu_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "triton", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA GPU"):
        jit.require_triton("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r"need compute capability 8\.0 .* has 7\.5"):
        jit.require_triton("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    jit.require_triton("cuda:0")


@pytest.mark.parametrize(
    ("head_dim", "padded"), [(8, 16), (32, 32), (64, 64), (80, 128), (96, 128), (256, 256)]
)
def test_heads_are_padded_to_powers_of_two(head_dim: int, padded: int) -> None:
    assert tiles.head_pad(head_dim) == padded
