"""Model directories in both dialects, what is read from them, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from baton.errors import ConfigError, ModelLoadError
from baton.model import hf_config, spec
from baton.model.spec import choose_dtype, kv_layout, load_spec, pair_to_token
from tests.models import EOS_TOKEN_ID, FAMILIES, VOCAB_SIZE, make_tiny_model


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def to_old_dialect(model_dir: Path) -> None:
    """Rewrite config.json as published models have it."""
    values = json.loads((model_dir / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    values["torch_dtype"] = values.pop("dtype")
    values.pop("layer_types", None)
    (model_dir / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_dialects_are_the_same_model(family: str, tmp_path: Path) -> None:
    make_tiny_model(family, tmp_path)
    new = load_spec(tmp_path)
    to_old_dialect(tmp_path)
    assert load_spec(tmp_path) == new
    assert AutoConfig.from_pretrained(tmp_path).architectures == [new.architecture]


def test_fields_are_read(tmp_path: Path) -> None:
    make_tiny_model("qwen3", tmp_path, dtype="bfloat16")
    model = load_spec(tmp_path)
    assert (model.architecture, model.dtype) == ("Qwen3ForCausalLM", "bfloat16")
    assert (model.vocab_size, model.num_layers, model.hidden_size) == (VOCAB_SIZE, 4, 64)
    assert (model.heads, model.kv_heads, model.head_dim) == (4, 2, 32)
    assert (model.intermediate_size, model.max_model_len) == (160, 2304)
    assert model.rms_norm_eps == 1e-5
    assert model.qk_norm
    assert model.tie_embeddings
    assert model.windows == (0, 0, 0, 0)
    assert model.eos_token_ids == (EOS_TOKEN_ID,)


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", (False, False, False, False)),
        ("llama-bias", (True, True, True, False)),
        ("qwen2", (True, False, False, False)),
        ("qwen3-untied", (True, True, False, True)),
    ],
)
def test_flags(family: str, flags: tuple[bool, ...], tmp_path: Path) -> None:
    model = load_spec(make_tiny_model(family, tmp_path))
    assert (model.qkv_bias, model.output_bias, model.mlp_bias, model.qk_norm) == flags


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {}, (48, 48, 48, 48)),
        ("mistral-full", {}, (0, 0, 0, 0)),
        ("llama", {"sliding_window": 8}, (0, 0, 0, 0)),
        ("qwen2-window", {}, (0, 0, 40, 40)),
        ("qwen2-window", {"layer_types": None, "max_window_layers": 3}, (0, 0, 0, 40)),
        ("qwen2-window", {"use_sliding_window": False}, (0, 0, 0, 0)),
        (
            "qwen2-window",
            {"layer_types": ["sliding_attention", "full_attention"] * 2},
            (40, 0, 40, 0),
        ),
    ],
)
def test_windows(
    family: str, changes: dict[str, Any], windows: tuple[int, ...], tmp_path: Path
) -> None:
    make_tiny_model(family, tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    assert load_spec(tmp_path).windows == windows


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 1024),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
    ],
)
def test_context_length_follows_scaling(
    rope: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    make_tiny_model("llama", tmp_path, max_len=1024)
    edit_json(tmp_path / "config.json", rope_parameters=rope)
    assert load_spec(tmp_path).max_model_len == expected


def test_generation_config_wins_for_end_tokens(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=7)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[9, 5, 9])
    assert load_spec(tmp_path).eos_token_ids == (5, 9)
    edit_json(tmp_path / "generation_config.json", eos_token_id=None)
    assert load_spec(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").unlink()
    edit_json(tmp_path / "config.json", eos_token_id=[3, 4])
    assert load_spec(tmp_path).eos_token_ids == (3, 4)
    edit_json(tmp_path / "config.json", eos_token_id=None)
    assert load_spec(tmp_path).eos_token_ids == ()


def test_architecture_from_model_type_alone(tmp_path: Path) -> None:
    make_tiny_model("qwen2", tmp_path)
    edit_json(tmp_path / "config.json", architectures=None, dtype=None)
    model = load_spec(tmp_path)
    assert (model.architecture, model.dtype) == ("Qwen2ForCausalLM", "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported: Ll"),
        ({"architectures": None, "model_type": "mamba"}, "mamba is not supported"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"dtype": "int8"}, "'int8' is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"num_key_value_heads": 3}, "cannot be shared"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "end"}, "eos_token_id must be a token id"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supp"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"full_attention": {}}}, "one per layer type"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_bad_config_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ModelLoadError) as caught:
        load_spec(tmp_path)
    assert message in caught.value.message
    assert str(tmp_path / "config.json") in caught.value.message


def test_bad_layer_types_are_named(tmp_path: Path) -> None:
    make_tiny_model("qwen2-window", tmp_path)
    edit_json(tmp_path / "config.json", layer_types=["sliding_attention", "chunked_attention"])
    with pytest.raises(ModelLoadError, match="layer_types must name 4 layers"):
        load_spec(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"nowhere does not exist"):
        load_spec(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json is not valid JSON"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"config\.json must hold a JSON object"):
        load_spec(tmp_path)


def test_fingerprint_is_of_content_not_place(tmp_path: Path) -> None:
    one = make_tiny_model("qwen3", tmp_path / "one", seed=1)
    shutil.copytree(one, tmp_path / "copy")
    same = load_spec(tmp_path / "copy").fingerprint
    assert load_spec(one).fingerprint == same
    assert len(bytes.fromhex(same)) == 16
    # The same shapes and header, other weights: a fine-tune must not share KV with its base.
    two = make_tiny_model("qwen3", tmp_path / "two", seed=2)
    assert load_spec(two).fingerprint != same
    edit_json(tmp_path / "copy" / "config.json", rms_norm_eps=1e-6)
    assert load_spec(tmp_path / "copy").fingerprint != same


def test_fingerprint_ignores_what_kv_does_not_depend_on(tmp_path: Path) -> None:
    make_tiny_model("qwen3", tmp_path)
    before = load_spec(tmp_path)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[7, 8])
    edit_json(tmp_path / "config.json", transformers_version="4.40.0", use_cache=False)
    after = load_spec(tmp_path)
    assert after.eos_token_ids == (7, 8)
    assert after.fingerprint == before.fingerprint


def test_layout_of_a_model(tmp_path: Path) -> None:
    model = load_spec(make_tiny_model("qwen3", tmp_path))
    layout = kv_layout(model, "bfloat16", 32)
    assert (layout.num_layers, layout.kv_heads, layout.head_dim) == (4, 2, 32)
    assert layout.model == model.fingerprint
    assert layout.block_bytes == 4 * 2 * 2 * 32 * 32 * 2
    with pytest.raises(ConfigError, match="block size"):
        kv_layout(model, "float32", 24)


def test_attention_next_to_products(tmp_path: Path) -> None:
    """Of LLaMA-70B: 64 heads of 128, and 856 million parameters per layer."""
    tiny = load_spec(make_tiny_model("qwen3", tmp_path))
    wide = replace(tiny, heads=64, kv_heads=8, head_dim=128, hidden_size=8192)
    large = replace(wide, intermediate_size=28_672)
    assert pair_to_token(large) == pytest.approx(4 * 64 * 128 / (2 * 855_638_016))
    assert pair_to_token(replace(large, windows=(0, 0, 0, 64))) == 0.75 * pair_to_token(large)


def test_choice_of_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = load_spec(make_tiny_model("llama", tmp_path / "full"))
    half = load_spec(make_tiny_model("llama", tmp_path / "half", dtype="bfloat16"))
    monkeypatch.setattr(spec, "cpu_has_bfloat16", lambda: False)
    assert choose_dtype("auto", half, "cpu") == "float32"
    assert choose_dtype("auto", half, "cuda") == "bfloat16"
    assert choose_dtype("bfloat16", half, "cpu") == "bfloat16"
    monkeypatch.setattr(spec, "cpu_has_bfloat16", lambda: True)
    assert choose_dtype("auto", half, "cpu") == "bfloat16"
    assert choose_dtype("auto", full, "cuda") == "float32"
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        choose_dtype("int4", full, "cpu")


def test_config_without_dtype_takes_the_weights(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path, dtype="bfloat16")
    edit_json(tmp_path / "config.json", dtype=None)
    assert load_spec(tmp_path).dtype == "bfloat16"


def test_supported_families_are_known_to_both_names() -> None:
    assert set(hf_config._BY_MODEL_TYPE.values()) == set(hf_config.FAMILIES)


def test_reading_a_spec_needs_no_torch() -> None:
    code = "import sys, baton.model.spec; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
