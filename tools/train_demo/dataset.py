"""Token streams and the training windows drawn from them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .chat import conversations
from .corpus import Pool, SourceFile
from .network import IGNORED
from .tokenizer import END_OF_TEXT

Ids = npt.NDArray[np.int64]

# Tests are most of the text but unlike other code: they teach the language early, and step back
# while the learning rate decays.
EARLY_MIXTURE = {"library": 0.55, "tests": 0.35, "chat": 0.10}
LATE_MIXTURE = {"library": 0.74, "tests": 0.12, "chat": 0.14}
# Share of windows that begin where a user's prompt may: at a file, a definition, a conversation.
ALIGNED_SHARE = {"library": 0.3, "tests": 0.1, "chat": 0.8}
SPLIT_RATE = 0.03


@dataclass(frozen=True)
class Stream:
    """The documents of one pool, each after an end-of-text token, as one line of ids."""

    ids: Ids
    starts: Ids
    """Positions where a window may begin like a prompt."""


@dataclass(frozen=True)
class Splits:
    """For each token, two tokens that spell the same bytes; -1 where there are none."""

    first: Ids
    second: Ids


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """The ids of each text, without special tokens around them."""
    return [np.array(e.ids, dtype=np.int64) for e in tokenizer.encode_batch(list(texts))]


def build_streams(
    tokenizer: Tokenizer, files: Sequence[SourceFile], seed: int
) -> dict[str, Stream]:
    """One stream per pool from the training files of `files`."""
    training = [file for file in files if not file.held_out]
    rng = random.Random(seed)
    streams: dict[str, Stream] = {}
    for pool in Pool:
        texts = [file.text for file in training if file.pool is pool]
        streams[pool.value] = _stream(tokenizer, texts)
    library = [file.text for file in training if file.pool is Pool.LIBRARY]
    chats = [chat for text in library for chat in conversations(text, rng)]
    rng.shuffle(chats)
    streams["chat"] = _stream(tokenizer, chats)
    return streams


def find_splits(tokenizer: Tokenizer) -> Splits:
    """How each token can be spelled with two: leading blanks apart where possible."""
    vocab: dict[str, int] = tokenizer.get_vocab()
    first = np.full(len(vocab), -1, dtype=np.int64)
    second = first.copy()
    special = set(tokenizer.get_added_tokens_decoder())
    for text, index in vocab.items():
        cut = _cut(text, vocab)
        if index not in special and cut:
            first[index], second[index] = vocab[text[:cut]], vocab[text[cut:]]
    return Splits(first, second)


class WindowSampler:
    """Draws batches; a batch depends on the seed, the step and the arguments alone."""

    def __init__(self, streams: dict[str, Stream], splits: Splits, seed: int) -> None:
        self._streams = streams
        self._splits = splits
        self._seed = seed

    def draw(
        self, step: int, batch: int, length: int, mixture: Mapping[str, float] = EARLY_MIXTURE
    ) -> tuple[Ids, Ids]:
        """Inputs and targets, each [batch, length]; targets hold IGNORED where none is learned.

        `mixture` is each pool's share of the windows.
        """
        rng = np.random.default_rng((self._seed, step))
        names = rng.choice(list(mixture), size=batch, p=list(mixture.values()))
        windows = [self._window(str(name), length, rng) for name in names]
        inputs = np.stack([ids[:-1] for ids, _ in windows])
        targets = np.stack([np.where(learned, ids, IGNORED)[1:] for ids, learned in windows])
        return inputs, targets

    def _window(
        self, name: str, length: int, rng: np.random.Generator
    ) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """`length + 1` ids, and which of them are worth predicting."""
        stream = self._streams[name]
        last = len(stream.ids) - length - 1
        start = int(rng.integers(last))
        if rng.random() < ALIGNED_SHARE[name]:
            start = min(int(rng.choice(stream.starts)), last)
        ids, learned = _respell(stream.ids[start : start + length + 1], self._splits, rng)
        return ids[: length + 1], learned[: length + 1]


def _respell(
    ids: Ids, splits: Splits, rng: np.random.Generator
) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Spells a few tokens with two, so that a prompt may end inside a word or after a blank.

    The first of the two is not learned: the model must continue such a spelling, not produce it.
    """
    chosen = (rng.random(len(ids)) < SPLIT_RATE) & (splits.first[ids] >= 0)
    out = np.repeat(ids, 1 + chosen)
    learned = np.ones(len(out), dtype=np.bool_)
    at = np.flatnonzero(chosen) + np.arange(chosen.sum())
    out[at], out[at + 1] = splits.first[ids[chosen]], splits.second[ids[chosen]]
    learned[at] = False
    return out, learned


def _cut(text: str, vocab: dict[str, int]) -> int:
    """Where to cut a token so that both parts are tokens; 0 where it cannot be cut."""
    cuts = [1, *sorted(range(2, len(text)), key=lambda cut: abs(2 * cut - len(text)))]
    blank = text[0] in "ĠĊ._"
    for cut in cuts if blank else cuts[1:] + cuts[:1]:
        if 0 < cut < len(text) and text[:cut] in vocab and text[cut:] in vocab:
            return cut
    return 0


def _stream(tokenizer: Tokenizer, texts: Sequence[str]) -> Stream:
    end_of_text = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.int64)
    documents = encode_documents(tokenizer, texts)
    ids = np.concatenate([part for document in documents for part in (end_of_text, document)])
    lengths = np.array([len(document) + 1 for document in documents])
    opens = np.cumsum(lengths) - lengths + 1
    return Stream(ids, np.concatenate([opens, _definitions(tokenizer, ids)]))


def _definitions(tokenizer: Tokenizer, ids: Ids) -> Ids:
    """Positions of `def` and `class` at the left margin."""
    vocab = tokenizer.get_vocab()
    breaks = [vocab["Ċ" * count] for count in (1, 2, 3)]
    words = [vocab[word] for word in ("def", "class")]
    found: Ids = 1 + np.flatnonzero(np.isin(ids[:-1], breaks) & np.isin(ids[1:], words))
    return found
