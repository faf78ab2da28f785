"""The same request gives the same tokens: transformers, co-located baton, 1P1D and 2P2D.

For each model family and for the demo model, over 100 prompts of 1 to 2,000 tokens that run
concurrently in real processes with KV handed over by the default transport.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from baton.demo import demo_model_path
from baton.v1 import inference_pb2, inference_pb2_grpc
from tests.cluster.conftest import Cluster, ClusterFactory
from tests.models import FAMILIES, VOCAB_SIZE, make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_PROMPTS = 104
MAX_TOKENS = 12
# One directory per architecture and per feature that changes what attention sees.
TINY = ("llama", "llama3", "mistral", "qwen2", "qwen2-yarn", "qwen3")
SHAPES = {
    "colocated": ("--colocated", "--decode", "1"),
    "1P1D": ("--prefill", "1", "--decode", "1"),
    "2P2D": ("--prefill", "2", "--decode", "2"),
}


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    seed: int


def mixed_prompts(vocab_size: int) -> list[Case]:
    """Lengths from 1 to 2,000: the ends, block and chunk boundaries, and a skewed mix."""
    draw = random.Random(20)
    edges = [1, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1024, 2000]
    rest = [min(2000, int(draw.paretovariate(0.7) * 12)) for _ in range(NUM_PROMPTS - len(edges))]
    lengths = edges + rest
    draw.shuffle(lengths)
    shared = tuple(draw.randrange(4, vocab_size) for _ in range(2000))
    cases = []
    for number, length in enumerate(lengths):
        fresh = tuple(draw.randrange(4, vocab_size) for _ in range(length))
        head = length // 2 if number % 4 == 0 else 0  # every fourth shares a prefix with others
        cases.append(Case(shared[:head] + fresh[head:], seed=number))
    return cases


def greedy_reference(path: Path, cases: Sequence[Case]) -> list[tuple[int, ...]]:
    """What transformers' `generate` answers in float32, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    answers = []
    with torch.inference_mode():
        for case in cases:
            prompt = torch.tensor([case.prompt])
            answer = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
                pad_token_id=0,
            )
            answers.append(tuple(answer[0, len(case.prompt) :].tolist()))
    return answers


async def generate_all(
    cluster: Cluster, cases: Sequence[Case], temperature: float
) -> list[tuple[int, ...]]:
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def one(case: Case) -> tuple[int, ...]:
            request = inference_pb2.GenerateRequest(
                model=cluster.ready["model"],
                token_ids=inference_pb2.TokenIds(ids=case.prompt),
                sampling=inference_pb2.SamplingOptions(
                    max_tokens=MAX_TOKENS, temperature=temperature, seed=case.seed
                ),
            )
            tokens: list[int] = []
            async for message in stub.Generate(request, timeout=300):
                tokens.extend(message.token_ids)
            return tuple(tokens)

        return list(await asyncio.gather(*(one(case) for case in cases)))


def differences(
    cases: Sequence[Case], got: Sequence[tuple[int, ...]], want: Sequence[tuple[int, ...]]
) -> list[str]:
    return [
        f"prompt of {len(case.prompt)} tokens: {left} instead of {right}"
        for case, left, right in zip(cases, got, want, strict=True)
        if left != right
    ]


@pytest.fixture(scope="module", params=(*TINY, "demo"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return demo_model_path()
    assert request.param in FAMILIES
    return make_tiny_model(request.param, tmp_path_factory.mktemp("models") / request.param)


def test_tokens_are_equal_whatever_the_cluster(model: Path, start_cluster: ClusterFactory) -> None:
    vocab_size = 4096 if model == demo_model_path() else VOCAB_SIZE
    cases = mixed_prompts(vocab_size)
    want = greedy_reference(model, cases)
    sampled: dict[str, list[tuple[int, ...]]] = {}
    for shape, flags in SHAPES.items():
        # A small pool and budget: chunked prefill, queueing and eviction all take part.
        with start_cluster(
            str(model), *flags, "--dtype", "float32", "--max-batch-tokens", "256",
            "--kv-memory-mib", "64",
        ) as cluster:  # fmt: skip
            got = asyncio.run(generate_all(cluster, cases, temperature=0.0))
            assert not differences(cases, got, want), shape
            sampled[shape] = asyncio.run(generate_all(cluster, cases, temperature=0.8))
            cluster.assert_idle()
    for shape in SHAPES:
        assert not differences(cases, sampled[shape], sampled["colocated"]), shape
    assert sampled["colocated"] != want  # sampling did sample


@pytest.mark.parametrize("transport", ["nixl", "nccl", "shm"])
def test_tokens_are_equal_whatever_the_transport(
    transport: str, tmp_path: Path, start_cluster: ClusterFactory
) -> None:
    path = make_tiny_model("qwen3", tmp_path / "tiny")
    cases = [case for case in mixed_prompts(VOCAB_SIZE) if len(case.prompt) < 700][:24]
    with start_cluster(
        str(path), "--prefill", "1", "--decode", "1", "--dtype", "float32",
        "--transport", transport, "--verify", "full",
    ) as cluster:  # fmt: skip
        got = asyncio.run(generate_all(cluster, cases, temperature=0.0))
        cluster.assert_idle()
        workers = cluster.status()["workers"]
    assert {worker["transport"] for worker in workers} == {transport}
    assert not differences(cases, got, greedy_reference(path, cases))
