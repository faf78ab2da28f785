"""How far training has come, and what follows from it: learning rate and context length."""

from __future__ import annotations

from dataclasses import dataclass

WARMUP_STEPS = 40
DECAY_FROM = 0.5
LONG_CONTEXT_FROM = 0.87
FINAL_RATE = 0.02
HURRY_SECONDS = 180.0


@dataclass
class Schedule:
    """Progress from 0 to 1 by tokens or by time, whichever is further, so a run always ends."""

    target_tokens: int
    limit_seconds: float
    _hurried_at: tuple[float, float] | None = None

    def progress(self, tokens: int, elapsed: float) -> float:
        """`elapsed` in seconds of training, over all resumed runs."""
        progress = max(tokens / self.target_tokens, elapsed / self.limit_seconds)
        if self._hurried_at is not None:
            start, reached = self._hurried_at
            progress = max(progress, reached + (1 - reached) * (elapsed - start) / HURRY_SECONDS)
        return min(progress, 1.0)

    def hurry(self, tokens: int, elapsed: float) -> None:
        """Finish within HURRY_SECONDS from now, with the learning rate still decayed to its end."""
        if self._hurried_at is None:
            self._hurried_at = (elapsed, self.progress(tokens, elapsed))


def rate_factor(progress: float, step: int) -> float:
    """Warm up, stay, then decay linearly (warmup-stable-decay)."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    if progress < DECAY_FROM:
        return warm
    left = (1 - progress) / (1 - DECAY_FROM)
    return warm * (FINAL_RATE + (1 - FINAL_RATE) * left)


def context_length(progress: float) -> int:
    """Tokens per window: short and cheap at first, the stated context at the end."""
    return 4096 if progress >= LONG_CONTEXT_FROM else 1024
