"""Held-out figures: the model against knowing nothing and against knowing token frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from .corpus import SourceFile
from .dataset import Ids, encode_documents
from .network import Decoder, token_losses
from .tokenizer import END_OF_TEXT

WINDOW = 2048


@dataclass(frozen=True)
class HeldOut:
    """Documents that training never saw."""

    documents: list[Ids]
    """Each begins with an end-of-text token, which is context and not predicted."""
    text_bytes: int

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(len(document) - 1 for document in self.documents)


@dataclass(frozen=True)
class Figure:
    """A mean loss in the two units that people compare."""

    perplexity: float
    """Per token."""
    bits_per_byte: float


def held_out_text(tokenizer: Tokenizer, files: Sequence[SourceFile]) -> HeldOut:
    """The held-out files of `files`."""
    texts = [file.text for file in files if file.held_out]
    start = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.int64)
    documents = [np.concatenate([start, ids]) for ids in encode_documents(tokenizer, texts)]
    return HeldOut(documents, sum(len(text.encode()) for text in texts))


@torch.inference_mode()
def mean_loss(model: Decoder, text: HeldOut, limit: int | None = None) -> float:
    """Nats per token, each token predicted once from up to WINDOW tokens of its own file.

    `limit` takes the first windows up to that many tokens.
    """
    total, count = 0.0, 0
    for document in text.documents:
        for start in range(0, len(document) - 1, WINDOW):
            ids = torch.from_numpy(document[start : start + WINDOW + 1])
            states = model(ids[None, :-1])[0]
            total += float(token_losses(states, model.embed_tokens.weight, ids[1:]).sum())
            count += len(ids) - 1
            if limit is not None and count >= limit:
                return total / count
    return total / count


def unigram_loss(training: Ids, text: HeldOut, vocab_size: int) -> float:
    """Nats per token of the training text's token frequencies (one added to each count)."""
    counts = np.bincount(training, minlength=vocab_size) + 1.0
    losses = -np.log(counts / counts.sum())
    return float(sum(losses[document[1:]].sum() for document in text.documents) / text.tokens)


def figure(loss: float, text: HeldOut) -> Figure:
    """`loss` in nats per token of `text`."""
    return Figure(math.exp(loss), loss / math.log(2) * text.tokens / text.text_bytes)
