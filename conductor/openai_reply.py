"""What OpenAI's clients get back: whole answers and stream chunks, as plain dicts for orjson."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from baton.tokenizer import Tokenizer
from baton.types.request import SampledToken, TokenLogprob
from conductor.answer_run import Delta
from conductor.dispatch import Usage
from conductor.request import Request


class Reply:
    """Builds bodies for one request. Subclasses say how a choice looks."""

    object_name: str
    chunk_name: str

    def __init__(
        self, request: Request, tokenizer: Tokenizer, want_token_ids: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._want_ids = want_token_ids
        self.want_logprobs = any(a.sampling.logprobs is not None for a in request.answers)
        self._head = {"id": request.id, "created": int(time.time()), "model": request.model}
        self._answers = len(request.answers)

    @property
    def text_only(self) -> bool:
        """Whether a chunk in the middle of an answer has nothing but its text."""
        return not self.want_logprobs and not self._want_ids

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return []

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """The chunk for a delta; None when it has nothing to show yet."""
        tokens = delta.tokens[: len(delta.tokens) - delta.hidden]
        logprobs = self._logprobs(tokens, delta.offsets) if self.want_logprobs and tokens else None
        ids = self._ids([delta])
        silent = not delta.text and logprobs is None and not ids.get("token_ids")
        if silent and delta.finish_reason is None:
            return None
        return self.frame([self._chunk_choice(delta, logprobs) | ids])

    def frame(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_name, "choices": choices}
        if usage is not None:
            chunk["usage"] = usage_body(usage)
        return chunk

    def whole(self, deltas: Iterable[Delta], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        by_answer: list[list[Delta]] = [[] for _ in range(self._answers)]
        for delta in deltas:
            by_answer[delta.index].append(delta)
        choices = [
            self._whole_choice(i, parts) | self._ids(parts) for i, parts in enumerate(by_answer)
        ]
        return {
            **self._head,
            "object": self.object_name,
            "choices": choices,
            "usage": usage_body(usage),
        }

    def _ids(self, deltas: Sequence[Delta]) -> dict[str, list[int]]:
        """Every token that was generated, those without text included: with them a client can put
        an answer into its next prompt exactly."""
        if not self._want_ids:
            return {}
        return {"token_ids": [token.token_id for delta in deltas for token in delta.tokens]}

    def _chunk_choice(self, delta: Delta, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[SampledToken], offsets: Sequence[int]) -> dict[str, Any]:
        raise NotImplementedError

    def _joined(self, deltas: Sequence[Delta]) -> tuple[str, dict[str, Any] | None, str | None]:
        """Text, log-probabilities and finish reason of one whole answer."""
        text = "".join(delta.text for delta in deltas)
        reason = next((d.finish_reason for d in reversed(deltas) if d.finish_reason), None)
        if not self.want_logprobs:
            return text, None, reason
        shown = [
            pair
            for delta in deltas
            for pair in list(zip(delta.tokens, delta.offsets, strict=True))[
                : len(delta.tokens) - delta.hidden
            ]
        ]
        tokens, offsets = [token for token, _ in shown], [offset for _, offset in shown]
        return text, self._logprobs(tokens, offsets), reason


class CompletionReply(Reply):
    object_name = "text_completion"
    chunk_name = "text_completion"

    def _chunk_choice(self, delta: Delta, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def _whole_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text, logprobs, reason = self._joined(deltas)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[SampledToken], offsets: Sequence[int]) -> dict[str, Any]:
        names = [self._name(token.token_id) for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [_logprob(token.logprob) for token in tokens],
            "top_logprobs": [
                {self._name(number): value for number, value in token.logprob.top}
                if token.logprob
                else {}
                for token in tokens
            ],
            "text_offset": list(offsets[: len(tokens)]),
        }

    def _name(self, token_id: int) -> str:
        """The token's text; `bytes:\\x..` when it is a part of a character."""
        raw = self._tokenizer.token_bytes(token_id)
        text = _text_of(raw)
        return _escaped(raw, "bytes:") if text is None else text


class ChatReply(Reply):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        return [
            self.frame(
                [
                    {
                        "index": index,
                        "delta": {"role": "assistant", "content": ""},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                ]
            )
            for index in range(self._answers)
        ]

    def _chunk_choice(self, delta: Delta, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def _whole_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text, logprobs, reason = self._joined(deltas)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    def _logprobs(self, tokens: Sequence[SampledToken], offsets: Sequence[int]) -> dict[str, Any]:
        content = [
            {
                **self._entry(token.token_id, _logprob(token.logprob)),
                "top_logprobs": [
                    self._entry(number, value)
                    for number, value in (token.logprob.top if token.logprob else ())
                ],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        text = _text_of(raw)
        return {
            "token": _escaped(raw, "") if text is None else text,
            "logprob": logprob,
            "bytes": list(raw),
        }


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _logprob(logprob: TokenLogprob | None) -> float | None:
    return None if logprob is None else logprob.logprob


def _text_of(raw: bytes) -> str | None:
    """None when the bytes are not whole characters."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _escaped(raw: bytes, prefix: str) -> str:
    return prefix + "".join(f"\\x{byte:02x}" for byte in raw)
