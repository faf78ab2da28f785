"""The demo model's training script: what it feeds the model, and when it ends."""

from __future__ import annotations

import ast
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from baton.demo import demo_model_path
from tools.train_demo.chat import Exchange, conversations, render
from tools.train_demo.corpus import read_corpus, standard_library
from tools.train_demo.dataset import Stream, WindowSampler, find_splits
from tools.train_demo.network import IGNORED, Decoder, Shape
from tools.train_demo.schedule import HURRY_SECONDS, Schedule, context_length, rate_factor

transformers = pytest.importorskip("transformers")

SOURCE = '''
class Shelf:
    def count(self):
        """Return the number of books. Never negative."""
        return len(self.books)

    def __len__(self):
        return self.count()

def clear(shelf):
    shelf.books = []
'''


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))


@pytest.fixture
def sampler(tokenizer: Tokenizer) -> WindowSampler:
    ids = np.array(tokenizer.encode(SOURCE * 40).ids, dtype=np.int64)
    stream = Stream(ids, np.array([1, 5], dtype=np.int64))
    pools = {"library": stream, "tests": stream, "chat": stream}
    return WindowSampler(pools, find_splits(tokenizer), seed=0)


def test_held_out_files_are_a_small_fixed_share() -> None:
    files = read_corpus(standard_library())
    held_out = {file.path for file in files if file.held_out}
    assert 0.03 < len(held_out) / len(files) < 0.09
    assert held_out == {file.path for file in read_corpus(standard_library()) if file.held_out}
    assert not any("site-packages" in file.path for file in files)


def test_chat_examples_are_functions_at_the_left_margin() -> None:
    text = "".join(conversations(SOURCE, random.Random(0)))
    answers = [turn.split("<|end|>")[0] for turn in text.split("<|assistant|>")[1:]]
    functions = [node for answer in answers for node in ast.parse(answer).body]
    names = [node.name for node in functions if isinstance(node, ast.FunctionDef)]
    assert len(names) == len(functions)
    assert sorted(names) == ["clear", "count"]
    assert "the number of books" in text


def test_chat_examples_look_like_the_chat_template() -> None:
    exchange = Exchange("Add.", "def add(a, b):\n    return a + b")
    rendered = transformers.AutoTokenizer.from_pretrained(demo_model_path()).apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": exchange.instruction},
            {"role": "assistant", "content": exchange.answer},
        ],
        tokenize=False,
    )
    assert rendered == render([exchange], "Be brief.")


def test_every_split_spells_the_same_bytes(tokenizer: Tokenizer) -> None:
    splits = find_splits(tokenizer)
    names = {index: text for text, index in tokenizer.get_vocab().items()}
    whole = np.flatnonzero(splits.first >= 0)
    assert len(whole) > 3000
    for index in whole:
        first, second = splits.first[index], splits.second[index]
        assert names[int(first)] + names[int(second)] == names[int(index)]


def test_a_batch_depends_on_the_step_alone(sampler: WindowSampler) -> None:
    inputs, targets = sampler.draw(step=3, batch=4, length=64)
    again, _ = sampler.draw(step=3, batch=4, length=64)
    other, _ = sampler.draw(step=4, batch=4, length=64)
    assert inputs.shape == targets.shape == (4, 64)
    assert np.array_equal(inputs, again)
    assert not np.array_equal(inputs, other)


def test_targets_are_the_next_inputs_or_ignored(sampler: WindowSampler) -> None:
    inputs, targets = sampler.draw(step=0, batch=8, length=128)
    following, learned = inputs[:, 1:], targets[:, :-1] != IGNORED
    assert np.array_equal(following[learned], targets[:, :-1][learned])
    assert 0.9 < learned.mean() < 1.0


def test_progress_ends_by_tokens_by_time_and_in_a_hurry() -> None:
    schedule = Schedule(target_tokens=1000, limit_seconds=1000.0)
    assert schedule.progress(500, 100.0) == 0.5
    assert schedule.progress(100, 700.0) == 0.7
    schedule.hurry(100, 200.0)
    assert schedule.progress(100, 200.0) == pytest.approx(0.2)
    assert schedule.progress(100, 200.0 + HURRY_SECONDS) == pytest.approx(1.0)


def test_the_rate_warms_up_stays_and_decays() -> None:
    assert rate_factor(0.0, step=0) < 0.1
    assert rate_factor(0.3, step=1000) == 1.0
    assert rate_factor(0.6, step=1000) > rate_factor(0.9, step=1000) > rate_factor(1.0, 1000) > 0
    assert context_length(0.1) < context_length(1.0) == Shape().max_positions


def test_weights_are_named_as_in_the_exported_model() -> None:
    config = transformers.AutoConfig.from_pretrained(demo_model_path())
    theirs = transformers.Qwen3ForCausalLM(config).model.state_dict()
    ours = Decoder(Shape()).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
