"""The training loop: Muon for matrices, AdamW for the rest, resumable, stoppable, always ends."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .dataset import EARLY_MIXTURE, LATE_MIXTURE, Ids, WindowSampler
from .network import IGNORED, Decoder, token_losses
from .reporter import Progress, Reporter
from .schedule import DECAY_FROM, Schedule, context_length, rate_factor

STEP_TOKENS = 8192
LOSS_CHUNK_TOKENS = 2048
CHECKPOINT_SECONDS = 120.0
HELD_OUT_SECONDS = 150.0


@dataclass(frozen=True)
class Rates:
    """Peak learning rates; Muon's is scaled to AdamW's update size."""

    matrices: float = 4e-3
    others: float = 3e-3
    weight_decay: float = 0.05


@dataclass
class Counters:
    """What a resumed run continues from."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains `model` in place.

    `held_out` gives the held-out loss in nats per token. A file called `STOP` in the checkpoint
    directory, or SIGTERM, makes the run decay and end within a few minutes.
    """

    def __init__(
        self,
        model: Decoder,
        sampler: WindowSampler,
        schedule: Schedule,
        checkpoints: Path,
        held_out: Callable[[Decoder], float],
        compiled: bool = True,
        rates: Rates | None = None,
    ) -> None:
        self._model = model
        self._sampler = sampler
        self._schedule = schedule
        self._checkpoint = checkpoints / "latest.pt"
        self._stop_file = checkpoints / "STOP"
        self._held_out = held_out
        self._rates = rates or Rates()
        self._optimizers = _optimizers(model, self._rates)
        self._loss = torch.compile(self._mean_loss, dynamic=False) if compiled else self._mean_loss
        self.counters = Counters()
        checkpoints.mkdir(parents=True, exist_ok=True)

    def resume(self) -> bool:
        """Continue from the last checkpoint; False where there is none."""
        if not self._checkpoint.exists():
            return False
        state: dict[str, Any] = torch.load(self._checkpoint, weights_only=True)
        self._model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.counters = Counters(**state["counters"])
        return True

    def run(self, reporter: Reporter) -> Counters:
        """Train until the schedule ends; returns what was done."""
        resumed = self.counters.seconds
        started = last_saved = last_measured = time.monotonic()
        progress = 0.0
        with _on_sigterm(self._stop_file.touch):
            while progress < 1.0:
                progress = self._schedule.progress(self.counters.tokens, self.counters.seconds)
                loss = self._step(progress)
                now = time.monotonic()
                self.counters.seconds = resumed + now - started
                reporter.step(Progress(progress, loss, **vars(self.counters)))
                if self._stop_file.exists():
                    self._schedule.hurry(self.counters.tokens, self.counters.seconds)
                if now - last_measured > HELD_OUT_SECONDS:
                    reporter.held_out(self._held_out(self._model), self.counters.tokens)
                    last_measured = now
                if now - last_saved > CHECKPOINT_SECONDS:
                    self._save()
                    last_saved = now
        self._save()
        self._stop_file.unlink(missing_ok=True)
        return self.counters

    def discard_checkpoint(self) -> None:
        """Call when the result is safe elsewhere, so that the next run starts afresh."""
        self._checkpoint.unlink(missing_ok=True)

    def _step(self, progress: float) -> float:
        """One optimizer step; returns the training loss in nats per token."""
        length = context_length(progress)
        mixture = LATE_MIXTURE if progress >= DECAY_FROM else EARLY_MIXTURE
        batch = STEP_TOKENS // length
        inputs, targets = self._sampler.draw(self.counters.step, batch, length, mixture)
        loss = self._loss(_tensor(inputs), _tensor(targets))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        factor = rate_factor(progress, self.counters.step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad()
        self.counters.step += 1
        self.counters.tokens += STEP_TOKENS
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"loss is {value} at step {self.counters.step}")
        return value

    def _mean_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        states: Tensor = self._model(inputs).flatten(0, 1)
        flat = targets.flatten()
        output = self._model.embed_tokens.weight
        # In chunks: the logits of a whole step would be 134 MB of float32.
        parts = [
            token_losses(chunk, output, wanted).sum()
            for chunk, wanted in zip(
                torch.split(states, LOSS_CHUNK_TOKENS),
                torch.split(flat, LOSS_CHUNK_TOKENS),
                strict=True,
            )
        ]
        return torch.stack(parts).sum() / (flat != IGNORED).sum()

    def _save(self) -> None:
        state = {
            "model": self._model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "counters": vars(self.counters),
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._checkpoint)  # noqa: PTH105 - the atomic rename is the point


def _optimizers(model: Decoder, rates: Rates) -> list[torch.optim.Optimizer]:
    inner = [p for p in model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(
        [{"params": inner, "peak": rates.matrices}],
        lr=rates.matrices,
        weight_decay=rates.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(
        [
            {"params": [model.embed_tokens.weight], "peak": rates.others, "weight_decay": 0.01},
            {"params": norms, "peak": rates.others, "weight_decay": 0.0},
        ],
        lr=rates.others,
        betas=(0.9, 0.98),
    )
    return [muon, adam]


def _tensor(ids: Ids) -> Tensor:
    return torch.from_numpy(ids)


@contextlib.contextmanager
def _on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, lambda _signal, _frame: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
