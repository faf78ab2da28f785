"""`python -m sim.costs.published`: what the cost model says where somebody has measured.

FAST'25 is "Mooncake: Trading More Storage for Less Computation", LLaMA3-70B on one 8xA800 node with
vLLM 0.5.1 underneath. Its bars and lines were read off the coordinates in the published PDF, which
are exact to a percent. Figure 14 (prompts of 8k to 128k tokens, 0 and 95 % of them cached, decodes
of 128 tokens) is what the A800 preset was fitted to, less its cached half; nothing else here was
used for a fit. "Prefill" holds the loading of the cached prefix there, and does here, without any
overlap.

TensorRT-LLM: docs/source/performance.md of release 0.6.1 (latency of the first token, batch 1) and
docs/source/performance/perf-overview.md of release 1.0 (most output tokens per second). NIM: NVIDIA
NIM for LLMs benchmarking guide, version 1.8.0 of Llama-3.3-70b-instruct on two H100.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sim.costs.capacity import kv_capacity_blocks
from sim.costs.compute import Prefill, Roofline, StepCost
from sim.costs.machines import MACHINES, Node
from sim.costs.models import MODELS, ModelSpec

PREFILL_S = {8192: 1.002, 16_384: 2.056, 32_768: 4.479, 65_536: 10.587, 131_072: 27.51}
CACHED_S = {8192: 0.135, 16_384: 0.226, 32_768: 0.407, 65_536: 0.881, 131_072: 2.328}
DECODE_S = {8192: 0.02651, 16_384: 0.02682, 32_768: 0.02751, 65_536: 0.02859, 131_072: 0.03077}
TRANSFER_S = {8192: 0.030, 131_072: 0.495}
MEAN_PREFILL_S = 1.661  # figure 8, conversation, vLLM: every prompt computed whole
MEAN_CHUNKED_S = 2.021  # the same with chunks
CHUNK = 512  # tokens of a step, vLLM 0.5.1's default

_BLOCK = 16  # tokens of a KV block of TensorRT-LLM, and its share of memory left free
_FREE = 0.05
_STEP_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Row:
    """`published` and `modelled` in the same unit."""

    what: str
    published: float
    modelled: float
    unit: str

    @property
    def error(self) -> float:
        return self.modelled / self.published - 1


def mooncake() -> Iterator[Row]:
    """FAST'25, figure 14, one request at a time."""
    spec, node = MODELS["llama3-70b"], MACHINES["8xA800"]
    cost = Roofline(spec, node, 8)
    for tokens, seconds in PREFILL_S.items():
        yield Row(f"prefill of {tokens}", seconds, cost.seconds([Prefill(tokens)], []), "s")
    for tokens, seconds in CACHED_S.items():
        new = round(tokens * 0.05)
        loading = (tokens - new) * spec.kv_bytes_per_token / node.pcie_bytes_per_s
        modelled = loading + cost.seconds([Prefill(new, tokens - new)], [])
        yield Row(f"prefill of {tokens}, 95 % cached", seconds, modelled, "s")
    for tokens, seconds in DECODE_S.items():
        modelled = cost.seconds([], [tokens])
        yield Row(f"decode behind {tokens}", seconds * 1e3, modelled * 1e3, "ms")
    for tokens, seconds in TRANSFER_S.items():
        modelled = tokens * spec.kv_bytes_per_token / node.nic_bytes_per_s
        yield Row(f"transfer of {tokens}", seconds * 1e3, modelled * 1e3, "ms")


def conversation(trace: Path) -> Iterator[Row]:
    """FAST'25, figure 8: mean time of a prefill over the conversation trace."""
    cost = Roofline(MODELS["llama3-70b"], MACHINES["8xA800"], 8)
    prompts = [json.loads(line)["input_length"] for line in trace.read_text().splitlines()]
    whole = sum(cost.seconds([Prefill(prompt)], []) for prompt in prompts)
    chunked = sum(_in_chunks(cost, prompt) for prompt in prompts)
    yield Row("mean prefill", MEAN_PREFILL_S, whole / len(prompts), "s")
    yield Row(f"mean prefill, chunks of {CHUNK}", MEAN_CHUNKED_S, chunked / len(prompts), "s")


def nvidia() -> Iterator[Row]:
    """Others' engines on A100, H100 and H200."""
    llama2, llama3 = MODELS["llama2-70b"], MODELS["llama3-70b"]
    a100, (h100, fp8) = _a100(), _fp8(MACHINES["8xH100"], llama3)
    for prompt, ms in ((2048, 377), (128, 47)):
        cost = Roofline(llama2, a100, 4)
        name = f"LLaMA2-70B, 4 A100, FP16: first token of {prompt}"
        yield Row(name, ms, cost.seconds([Prefill(prompt)], []) * 1e3, "ms")
    for prompt, ms in ((2048, 109), (128, 26)):
        cost = Roofline(_fp8(h100, llama2)[1], h100, 4)
        name = f"LLaMA2-70B, 4 H100, FP8: first token of {prompt}"
        yield Row(name, ms, cost.seconds([Prefill(prompt)], []) * 1e3, "ms")
    cost = Roofline(fp8, h100, 2)
    name = "NIM, Llama-3.3-70B, 2 H100, FP8"
    yield Row(f"{name}: first token of 5000", 406.8, cost.seconds([Prefill(5000)], []) * 1e3, "ms")
    yield Row(f"{name}: decode, 5250 tokens", 18.58, cost.seconds([], [5250]) * 1e3, "ms")
    most = {(1000, 1000): 4205, (2048, 128): 762, (5000, 500): 898, (20_000, 2000): 437}
    for (prompt, answer), rate in most.items():
        name = f"Llama-3.3-70B, 2 H100, FP8: highest rate of {prompt} + {answer}"
        yield Row(name, rate, _throughput(fp8, h100, 2, prompt, answer), "tokens/s")
    h200, fp8 = _fp8(MACHINES["8xH200"], llama3)
    most = {(1000, 1000): 2909, (2048, 128): 442, (5000, 500): 566, (20_000, 2000): 283}
    for (prompt, answer), rate in most.items():
        name = f"Llama-3.3-70B, 1 H200, FP8: highest rate of {prompt} + {answer}"
        yield Row(name, rate, _throughput(fp8, h200, 1, prompt, answer), "tokens/s")


def _in_chunks(cost: StepCost, prompt: int) -> float:
    starts = range(0, prompt, CHUNK)
    return sum(cost.seconds([Prefill(min(CHUNK, prompt - at), at)], []) for at in starts)


def _throughput(spec: ModelSpec, node: Node, gpus: int, prompt: int, answer: int) -> float:
    """Output tokens per second with memory full of requests, prefills and decodes in turns."""
    cost = Roofline(spec, node, gpus)
    tokens = kv_capacity_blocks(spec, node, gpus, _BLOCK, _FREE) * _BLOCK
    batch = tokens // (prompt + answer)
    prompts = max(1, _STEP_TOKENS // prompt)
    prefill = cost.seconds([Prefill(prompt)] * prompts, []) / prompts
    decode = cost.seconds([], [prompt + answer // 2] * batch) / batch
    return answer / (prefill + answer * decode)


def _a100() -> Node:
    """The A800 preset with the NVLink of an A100 (600 GB/s, both directions) and the overhead of a
    compiled engine."""
    node = MACHINES["8xA800"]
    gpu = replace(node.gpu, nvlink_bytes_per_s=300e9)
    return replace(node, gpu=gpu, step_overhead_s=MACHINES["8xH100"].step_overhead_s)


def _fp8(node: Node, spec: ModelSpec) -> tuple[Node, ModelSpec]:
    """Twice the bf16 operations per second, half the bytes (NVIDIA H100 SXM datasheet)."""
    peak = 2 * MACHINES[node.name].gpu.flops
    return (
        replace(node, gpu=replace(node.gpu, flops=peak)),
        replace(spec, weight_width=1, kv_width=1),
    )


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = ["| | published | modelled | |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        figures = f"{row.published:.4g} {row.unit} | {row.modelled:.4g} {row.unit}"
        lines.append(f"| {row.what} | {figures} | {row.error:+.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = [*mooncake(), *nvidia()]
    if len(sys.argv) > 1:
        found += conversation(Path(sys.argv[1]))
    sys.stdout.write(table(found) + "\n")
