"""When the tokens of one streamed answer arrived, as its client saw it."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from baton.client.http import Piece, Usage


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the request was sent. `arrivals_s` has one entry per event with an answer."""

    arrivals_s: tuple[float, ...]
    end_s: float
    usage: Usage
    request_id: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token. An answer without any token counts to its end."""
        return self.arrivals_s[0] if self.arrivals_s else self.end_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for answers of one token."""
        later = self.usage.completion_tokens - 1
        if later < 1 or not self.arrivals_s:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / later

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of the whole request."""
        return self.usage.completion_tokens / self.end_s if self.end_s > 0 else 0.0

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Gaps between successive events (inter-token latencies)."""
        pairs = zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        return tuple(after - before for before, after in pairs)

    @property
    def first_gap_s(self) -> float | None:
        """How much longer the second token took than the later ones usually do (their median): what
        the client sees of a handoff. None for answers too short to tell."""
        gaps = self.itl_s
        return max(0.0, gaps[0] - statistics.median(gaps[1:])) if len(gaps) >= 3 else None

    def describe(self) -> str:
        """One line for people."""
        tpot = f"{self.tpot_s * 1e3:.1f} ms" if self.tpot_s is not None else "-"
        return (
            f"TTFT {self.ttft_s * 1e3:.0f} ms · TPOT {tpot} · {self.tokens_per_s:.1f} tokens/s · "
            f"{self.usage.completion_tokens} tokens from {self.usage.prompt_tokens} "
            f"({self.usage.cached_tokens} cached)"
        )


class Stopwatch:
    """Passes a stream's events through and remembers when they came; `timing` when it has ended."""

    def __init__(self) -> None:
        self._arrivals: list[float] = []
        self._usage = Usage(0, 0)
        self._request_id = ""
        self._end_s = 0.0

    async def watch(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        clock = asyncio.get_running_loop().time
        start = clock()
        async with aclosing(pieces):
            async for piece in pieces:
                now = clock() - start
                self._request_id = piece.request_id or self._request_id
                if piece.usage is not None:
                    self._usage = piece.usage
                elif piece.text or not piece.finish_reason:
                    self._arrivals.append(now)
                yield piece
        self._end_s = clock() - start

    @property
    def timing(self) -> Timing:
        return Timing(tuple(self._arrivals), self._end_s, self._usage, self._request_id)
