"""Random models of the benchmark load, and their tokenizer gives words back as the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from baton.model.spec import load_spec
from bench import models
from bench.shapes import EOS_ID, SHAPES, Shape, word

TINY = Shape(32, 2, 4, 2, 8, 64, 64, 128, tied=False)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)


@pytest.mark.usefixtures("tiny")
def test_a_model_loads_and_is_made_once(tmp_path: Path) -> None:
    path = models.ensure_model("tiny", tmp_path)
    spec = load_spec(path)
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size) == (32, 2, 64)
    assert spec.eos_token_ids == (EOS_ID,)
    weights = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not weights["lm_head.weight"][EOS_ID].any()
    made = (path / "model.safetensors").stat().st_mtime_ns
    assert models.ensure_model("tiny", tmp_path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == made
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.usefixtures("tiny")
def test_shards_hold_what_one_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(models.ensure_model("tiny", tmp_path / "a") / "model.safetensors")
    monkeypatch.setattr(models, "_SHARD_BYTES", 5000)
    path = models.ensure_model("tiny", tmp_path / "b")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(path / file)[name], whole[name])
    assert load_spec(path).num_layers == 2


@pytest.mark.usefixtures("tiny")
def test_words_come_back_as_their_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(models.ensure_model("tiny", tmp_path) / "tokenizer.json"))
    tokens = list(range(3, 64))
    assert tokenizer.encode(" ".join(word(token) for token in tokens)).ids == tokens
    assert tokenizer.decode(tokens) == " ".join(word(token) for token in tokens)
