"""The committed stubs are what the .proto files say."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gen_proto() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_proto", ROOT / "tools" / "gen_proto.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_stubs_are_fresh(
    gen_proto: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gen_proto.main(["--check"]) == 0, capsys.readouterr().err


def test_the_packages_admitted_by_pyproject_can_import_the_stubs() -> None:
    """The generators write the oldest runtime that they accept into each file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    grpc_text = (ROOT / "baton/v1/worker_pb2_grpc.py").read_text()
    grpc_needs = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", grpc_text)
    pb_text = (ROOT / "baton/v1/worker_pb2.py").read_text()
    pb_needs = re.search(r"# Protobuf Python Version: ([\d.]+)", pb_text)
    assert grpc_needs is not None
    assert pb_needs is not None
    assert f"grpcio>={grpc_needs[1]}" in project["dependencies"]
    assert f"protobuf>={pb_needs[1]},<8" in project["dependencies"]


def test_stale_missing_and_surplus_files_are_named(gen_proto: ModuleType, tmp_path: Path) -> None:
    gen_proto.write(tmp_path)
    assert gen_proto.stale_files(tmp_path) == []
    (tmp_path / "common_pb2.py").write_text("# edited\n")
    (tmp_path / "fleet_pb2.pyi").unlink()
    (tmp_path / "old_pb2.py").write_text("# its .proto is gone\n")
    assert gen_proto.stale_files(tmp_path) == ["common_pb2.py", "fleet_pb2.pyi", "old_pb2.py"]
    gen_proto.write(tmp_path)
    assert gen_proto.stale_files(tmp_path) == []
