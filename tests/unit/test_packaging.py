"""What is installed, what imports what, and what stays out of a process."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools import Distribution, find_packages

import baton

ROOT = Path(baton.__file__).parents[1]
SOURCES = (
    "baton",
    "conductor",
    "prefill_worker",
    "decode_worker",
    "elastic_worker",
    "kvstore",
    "sim",
)
TORCH_FREE = (
    "conductor.service",
    "conductor.http",
    "kvstore.store",
    "baton.engine.scheduler",
    "baton.engine.block_pool",
    "baton.engine.prefix_cache",
    "baton.engine.sequence",
    "baton.engine.loop",
    "baton.rpc.grpc_client",
    "baton.rpc.grpc_server",
    "baton.client.http",
    "baton.cli.main",
    "baton.ray.up",
    "baton.tokenizer",
    "baton.model.spec",
    "baton.types.request",
    "baton.config",
    "sim.run",
    "sim.costs.calibrate",
    "sim.costs.published",
)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(number) for name, number in pins}


def modules_after_import(module: str) -> set[str]:
    """Top-level names in `sys.modules` of a process that imported only `module`."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.split(".")[0] for name in done.stdout.split()}


def test_every_package_is_listed() -> None:
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for source in SOURCES
        for init in (ROOT / source).rglob("__init__.py")
    }
    listed = project()["tool"]["setuptools"]["packages"]["find"]["include"]
    assert found == set(find_packages(ROOT, include=listed))


def test_every_module_lies_in_a_package() -> None:
    for source in SOURCES:
        for module in (ROOT / source).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


def test_the_version_is_the_same_everywhere() -> None:
    assert project()["project"]["version"] == baton.__version__
    assert f"## {baton.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_pins_satisfy_the_supported_ranges() -> None:
    metadata = project()["project"]
    extras = metadata["optional-dependencies"]
    wanted = [*metadata["dependencies"], *(r for rs in extras.values() for r in rs)]
    pins = pinned()
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned"
        assert requirement.specifier.contains(pins[name]), requirement


def test_pins_name_no_place() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"[/+@]", re.sub(r"^#.*$", "", text, flags=re.M))


@pytest.mark.parametrize("name", ["grpcio", "protobuf", "torch", "pytest"])
def test_the_tests_run_with_the_pinned_versions(name: str) -> None:
    assert Version(Version(version(name)).public) == pinned()[name]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_leaves_torch_out(module: str) -> None:
    assert not modules_after_import(module) & {"torch", "nixl", "ray", "transformers"}


def test_imports_go_only_downward() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_starts_processes_without_importing_them() -> None:
    loaded = modules_after_import("baton.cli.main")
    assert not loaded & {
        "conductor",
        "prefill_worker",
        "decode_worker",
        "kvstore",
        "grpc",
        "starlette",
    }


def test_every_file_of_a_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks setuptools. Sources of the native operations are built, not copied."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    modules = {file for _, _, file in build.find_all_modules()}
    data = {f"{folder}/{name}" for _, folder, _, names in build.data_files for name in names}
    assert {Path(path) for path in modules | data} == {
        path.relative_to(ROOT)
        for source in SOURCES
        for path in (ROOT / source).rglob("*")
        if path.is_file()
        and path.suffix not in {".pyc", ".so"}
        and not path.is_relative_to(ROOT / "baton/native/src")
    }


def test_what_is_installed_is_small() -> None:
    for directory, limit in (("conductor/page", 100e3), ("baton/demo/model", 12e6)):
        assert sum(path.stat().st_size for path in (ROOT / directory).iterdir()) <= limit
