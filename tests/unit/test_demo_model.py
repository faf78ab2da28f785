"""The model that ships with the package: its size, its formats, and that it writes Python."""

from __future__ import annotations

import ast
import json
from typing import Any

import jinja2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from baton.demo import demo_model_path

MAX_DIRECTORY_BYTES = 12_000_000
MAX_NEW_TOKENS = 64

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        demo_model_path(), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def wrapped_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(demo_model_path())


def read_json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((demo_model_path() / name).read_text())
    return content


def complete(model: Any, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a greedy continuation, with the end token where the model ended it."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
    continuation: list[int] = out[0, ids.shape[1] :].tolist()
    return continuation


def test_directory_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in demo_model_path().iterdir()}
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= MAX_DIRECTORY_BYTES


def test_weights_are_bfloat16_and_finite() -> None:
    with safe_open(demo_model_path() / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            tensor = weights.get_tensor(name)
            assert tensor.dtype is torch.bfloat16, name
            assert tensor.isfinite().all(), name


def test_config_states_a_long_context_and_both_kinds_of_eos(tokenizer: Tokenizer) -> None:
    config, generation = read_json("config.json"), read_json("generation_config.json")
    assert config["max_position_embeddings"] >= 2048
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["eos_token_id"] == tokenizer.token_to_id("<|endoftext|>")
    assert generation["eos_token_id"] == [config["eos_token_id"], tokenizer.token_to_id("<|end|>")]


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    text = "".join(chr(code) for code in range(0x250)) + "\u20ac\U0001f40d"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert sum(len(token) == 1 for token in tokenizer.get_vocab()) == 256


def test_transformers_tokenizes_alike(tokenizer: Tokenizer, wrapped_tokenizer: Any) -> None:
    text = "<|user|>Hi<|end|><|assistant|>def f(x):\n        return  x_1 + 'né'\n\n\n"
    assert wrapped_tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids


def test_a_new_line_with_its_indentation_is_one_token(tokenizer: Tokenizer) -> None:
    for depth in range(5):
        assert len(tokenizer.encode("\n" + "    " * depth).ids) == 1


def test_chat_template_ends_with_the_assistant_marker(wrapped_tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two"},
    ]
    rendered = wrapped_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|system|>Be brief.<|end|><|user|>One<|end|><|assistant|>1<|end|><|user|>Two<|end|>"
        "<|assistant|>"
    )


def test_chat_template_refuses_an_unknown_role(wrapped_tokenizer: Any) -> None:
    with pytest.raises(jinja2.TemplateError, match="unknown role 'pirate'"):
        wrapped_tokenizer.apply_chat_template(
            [{"role": "pirate", "content": "Arr"}], tokenize=False
        )


def test_def_continues_as_a_function_header(model: Any, tokenizer: Tokenizer) -> None:
    text = "def " + tokenizer.decode(complete(model, tokenizer, "def "))
    header, colon, body = text.partition(":\n")
    assert colon, text
    parsed = ast.parse(f"{header}:\n    pass")
    assert isinstance(parsed.body[0], ast.FunctionDef)
    assert body.startswith("    "), text


def test_a_chat_answer_is_a_function_that_ends(
    model: Any, tokenizer: Tokenizer, wrapped_tokenizer: Any
) -> None:
    prompt = wrapped_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write a function that returns the name."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    answer = complete(model, tokenizer, prompt)
    assert answer[-1] == tokenizer.token_to_id("<|end|>")
    parsed = ast.parse(tokenizer.decode(answer, skip_special_tokens=True))
    assert isinstance(parsed.body[0], ast.FunctionDef)


def test_the_card_states_its_figures_and_licence() -> None:
    card = (demo_model_path() / "README.md").read_text()
    for stated in ("tokens trained", "perplexity", "unigram", "uniform", "PSF License Version 2"):
        assert stated in card
    assert "python -m tools.train_demo" in card
