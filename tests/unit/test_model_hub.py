"""From a name to a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from baton.demo import demo_model_path
from baton.errors import ModelLoadError
from baton.model.hub import resolve_model


def test_no_name_is_the_demo_model() -> None:
    assert resolve_model(None) == demo_model_path()


def test_directory(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nothing-here", "/no/such/place", "a/b/c", "https://x/y"])
def test_neither_directory_nor_hub_id(name: str) -> None:
    with pytest.raises(ModelLoadError, match="neither a model directory nor a hub id"):
        resolve_model(name)


def test_hub_id_is_downloaded_without_other_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("Qwen/Qwen3-0.6B") == tmp_path
    ((repo_id, options),) = calls
    assert repo_id == "Qwen/Qwen3-0.6B"
    assert "config.json" in options["allow_patterns"]
    assert not any(pattern.endswith(".bin") for pattern in options["allow_patterns"])


def test_offline_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match="no directory owner/name here, and the hub did not"):
        resolve_model("owner/name")
