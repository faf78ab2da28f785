"""Drive runners through prefill, decode and mixed steps, one step at a time or two in flight."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from baton.engine.batch import Batch, BatchItem, Runner, SampleRequest
from baton.engine.cuda_runner import CudaRunner
from baton.engine.graph_backend import GraphBackend, HostBackend
from baton.kernels.dispatch import kernels_for
from baton.kv.transport.base import PoolMemory
from baton.model.spec import kv_layout, load_spec
from baton.types.request import SamplingParams
from tests.models import VOCAB_SIZE

BLOCK_SIZE = 16
NUM_BLOCKS = 64
GREEDY = SamplingParams(temperature=0.0)
_BLOCKS_EACH = 6


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length))


PROMPTS = [random_prompt(length, seed=length) for length in (37, 15, 1)]
LATE = random_prompt(29, seed=3)
"""A prompt that arrives while others decode."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What each sequence asks for, in turns."""

    name: str
    params: tuple[SamplingParams, ...]

    def of(self, sequence: int) -> SamplingParams:
        return self.params[sequence % len(self.params)]


MIXED = [
    Sampling("greedy", (GREEDY,)),
    Sampling("noisy", (SamplingParams(temperature=0.8, seed=5), GREEDY)),
    Sampling("filtered", (SamplingParams(temperature=1.1, seed=2**64 - 1, top_k=9), GREEDY)),
    Sampling(
        "penalized",
        (SamplingParams(temperature=0.0, repetition_penalty=1.8), SamplingParams(seed=8)),
    ),
    Sampling("biased", (SamplingParams(temperature=0.0, logprobs=2, logit_bias=((17, 4.0),)),)),
]


_READS = frozenset(
    {
        "tolist",
        "item",
        "cpu",
        "numpy",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "unique",
    }
)


class NoHostReads(TorchFunctionMode):
    """Fails where baton's own code asks a tensor for its values: a recording could not repeat it.
    What Triton's interpreter does is not looked at."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _READS:
            caller = sys._getframe(1)
            assert "baton" not in caller.f_globals["__name__"], (
                f"{caller.f_code.co_name} reads values on the host: {func.__name__}"
            )
        return func(*args, **(kwargs or {}))


class StrictBackend(HostBackend):
    """Its recordings may not read values on the host, as those of a GPU may not."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        def strict() -> None:
            with NoHostReads():
                step()

        return super().record(strict)


def open_cuda_runner(
    model_dir: Path,
    backend: GraphBackend,
    kernels: str,
    buckets: Sequence[int],
    layer_groups: int = 2,
    dtype: str = "float32",
) -> CudaRunner:
    spec = load_spec(model_dir)
    layout = kv_layout(spec, dtype, BLOCK_SIZE)
    buffer = torch.zeros(NUM_BLOCKS * layout.block_bytes, dtype=torch.uint8, device=backend.device)
    memory = PoolMemory(buffer.data_ptr(), len(buffer), str(backend.device), buffer)
    return CudaRunner(
        spec,
        model_dir,
        layout,
        memory,
        NUM_BLOCKS,
        layer_groups,
        kernels_for(str(backend.device), kernels),
        backend,
        buckets,
    )


def _request(params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> SampleRequest:
    """As the scheduler makes it; of an item that follows, `output` lacks the last token."""
    if params.repetition_penalty == 1.0:
        return SampleRequest(params, len(output), ())
    return SampleRequest(params, len(output), (), tuple(prompt), tuple(output))


def prompt_item(
    sequence: int,
    prompt: Sequence[int],
    blocks: tuple[int, ...],
    params: SamplingParams = GREEDY,
) -> BatchItem:
    return BatchItem(sequence, tuple(prompt), 0, blocks, _request(params, prompt, ()))


def _blocks(sequence: int) -> tuple[int, ...]:
    return tuple(range(sequence * _BLOCKS_EACH, (sequence + 1) * _BLOCKS_EACH))


def answers_one_by_one(
    runner: Runner, prompts: Sequence[Sequence[int]], sampling: Sampling, steps: int
) -> list[list[int]]:
    """The answers of `steps` tokens (LATE's: as many as are left), nothing in flight."""
    everyone = [*prompts, LATE]
    answers: list[list[int]] = [[] for _ in everyone]
    for step in range(steps):
        items = []
        for number, prompt in enumerate(everyone[: None if step >= 2 else -1]):
            params, answer = sampling.of(number), answers[number]
            if not answer:
                items.append(prompt_item(number, prompt, _blocks(number), params))
                continue
            start = len(prompt) + len(answer) - 1
            asked = _request(params, prompt, answer)
            items.append(BatchItem(number, (answer[-1],), start, _blocks(number), asked))
        result = runner.launch(Batch(step, tuple(items))).wait()
        for item, token in zip(items, result.tokens, strict=True):
            assert token is not None
            answers[item.sequence].append(token.token_id)
    return answers


def answers_in_flight(
    runner: Runner, prompts: Sequence[Sequence[int]], sampling: Sampling, steps: int
) -> list[list[int]]:
    """The same, every step launched before the one before it is waited for. Rows turn round, so
    that a sequence's token is in another row than the step before put it."""
    everyone = [*prompts, LATE]
    blocks = [_blocks(number) for number in range(len(everyone))]
    answers: list[list[int]] = [[] for _ in everyone]
    launched: list[int] = [0] * len(everyone)
    waiting = []

    def settle() -> None:
        items, step = waiting.pop(0)
        for item, token in zip(items, step.wait().tokens, strict=True):
            assert token is not None
            assert token.index == len(answers[item.sequence])
            answers[item.sequence].append(token.token_id)

    for step in range(steps):
        decodes, chunks = [], []
        for number, prompt in enumerate(everyone[: None if step >= 2 else -1]):
            params = sampling.of(number)
            if not launched[number]:
                chunks.append(prompt_item(number, prompt, blocks[number], params))
            else:
                asked = _request(params, prompt, answers[number])
                asked = SampleRequest(
                    params, launched[number], (), asked.prompt, asked.output
                )  # `output` has what was waited for
                start = len(prompt) + launched[number] - 1
                decodes.append(BatchItem(number, (), start, blocks[number], asked, follows=True))
            launched[number] += 1
        turned = decodes[step % 3 :] + decodes[: step % 3]
        items = (*turned, *chunks)
        waiting.append((items, runner.launch(Batch(step, items))))
        if len(waiting) == 2:
            settle()
    settle()
    return answers
