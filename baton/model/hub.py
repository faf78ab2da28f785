"""From what a user names to a model directory: the demo model, a path, or a hub id. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from baton.demo import demo_model_path
from baton.errors import ModelLoadError

# What serving needs of a repository; leaves out duplicates in other formats.
_ALLOW_PATTERNS = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str | None) -> Path:
    """The directory of a model: None = the built-in demo model; else a directory, else a Hugging
    Face hub id (`owner/name`), downloaded into the hub's cache or taken from it.

    Blocking; may download for minutes. Raises ModelLoadError when there is no such model or the
    hub cannot be reached.
    """
    if name is None:
        return demo_model_path()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if _HUB_ID.fullmatch(name) is None:
        raise ModelLoadError(f"{name} is neither a model directory nor a hub id (owner/name)")
    return _download(name)


def _download(hub_id: str) -> Path:
    # Imported here: it costs a noticeable part of a second, and most starts do not need it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_ALLOW_PATTERNS))
    except Exception as error:
        # The hub's client, its HTTP library and its file cache raise a dozen unrelated classes
        # (no such repository, gated, offline, time-out, corrupt cache): all mean the same here.
        reason = str(error).strip().splitlines()
        raise ModelLoadError(
            f"no directory {hub_id} here, and the hub did not deliver a model of that name: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
