"""The built-in demo model, a package resource: `baton serve` without a model uses it."""

from __future__ import annotations

from pathlib import Path


def demo_model_path() -> Path:
    """The demo model's directory, in the layout of Hugging Face's libraries."""
    return Path(__file__).parent / "model"
