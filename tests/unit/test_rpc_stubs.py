"""The committed stubs are what the .proto files say."""

from __future__ import annotations

import importlib.util
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


def test_stale_missing_and_surplus_files_are_named(gen_proto: ModuleType, tmp_path: Path) -> None:
    gen_proto.write(tmp_path)
    assert gen_proto.stale_files(tmp_path) == []
    (tmp_path / "common_pb2.py").write_text("# edited\n")
    (tmp_path / "fleet_pb2.pyi").unlink()
    (tmp_path / "old_pb2.py").write_text("# its .proto is gone\n")
    assert gen_proto.stale_files(tmp_path) == ["common_pb2.py", "fleet_pb2.pyi", "old_pb2.py"]
    gen_proto.write(tmp_path)
    assert gen_proto.stale_files(tmp_path) == []
