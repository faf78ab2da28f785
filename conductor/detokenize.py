"""Token ids to text, one step at a time: only whole characters come out.

For every sequence of ids, the pieces that `push` and `flush` return join up to what decoding the
whole answer at once gives.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from baton.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = (6, 24, 96)  # how much of the prompt to try as context, shortest first


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """Text that has become final with this token; often empty inside of a character."""

    def flush(self) -> str:
        """The answer ends: what is left, with replacement characters for cut-off characters."""


def make_detokenizer(
    tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool = True
) -> Detokenizer:
    """The cheapest detokenizer that is exact for this tokenizer."""
    if tokenizer.byte_level:
        return ByteLevelDetokenizer(tokenizer, skip_special_tokens)
    return PrefixDetokenizer(tokenizer, prompt, skip_special_tokens)


class ByteLevelDetokenizer:
    """For byte-level BPE: a token is its bytes, so a UTF-8 decoder is all that is needed."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class PrefixDetokenizer:
    """For any tokenizer: decode a growing window twice and take the difference.

          context of the last piece         not yet final
        [ prefix ........ read ) [ read ................ end )

    The text of [prefix, end) minus the text of [prefix, read) is new, as soon as it does not end
    inside of a character. The window begins with the end of the prompt, so that the space which
    SentencePiece decoders strip from the start of a text is kept where the answer continues one.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._window = self._context(prompt)
        self._read = len(self._window)

    def push(self, token_id: int) -> str:
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        new = self._pending()
        if not new or new.endswith(_REPLACEMENT):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return new

    def flush(self) -> str:
        new = self._pending()
        self._read = len(self._window)
        return new

    def _context(self, prompt: Sequence[int]) -> list[int]:
        for size in _CONTEXT_TOKENS:
            context = list(prompt[-size:])
            if not self._decode(context).endswith(_REPLACEMENT):
                return context  # else it begins, or the prompt ends, inside of a character
        return []

    def _pending(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._read])) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)
