"""What another engine adds to a step, beyond what the machine's preset has.

Sources of `vllm-0.5`, the baseline of FAST'25 (0.5.1):
    between steps    nothing more: engines of that version leave a GPU idle for 5 to 13 ms between
                     two steps (vLLM issue 6854), and the A800 preset has 13 ms already, because it
                     is fitted to the figures of such an engine
    a sequence       processing its output took 3.4 ms for 32 sequences and 0.2 ms for one
                     (LLaMA3-70B on four H100, vLLM issue 6913), while the GPU waits
    eager mode       a step with a prompt is never a CUDA graph (vLLM issue 4056), nor is one with a
                     context above `max_seq_len_to_capture`, which is 8,192 unless told otherwise.
                     A lone decode of a dense model of 80 layers on eight GPUs took 39 ms so
                     (Qwen1.5-72B, vLLM 0.5.0, issue 4852). Those were L20, which need 21 ms to read
                     their weights and have no NVLink: this is the most that it can be. FAST'25 has
                     27 ms on its own A800, with engines that may or may not have used graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sim.costs.compute import Prefill, StepCost


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds."""

    sequence_s: float  # for each sequence in a step
    eager_step_s: float  # the least that a step takes which is no CUDA graph
    graph_tokens: int  # the longest context of a step that is one


NO_OVERHEAD = "none"
OVERHEADS: Mapping[str, Overhead | None] = {
    NO_OVERHEAD: None,
    "vllm-0.5": Overhead(sequence_s=(3.4e-3 - 0.2e-3) / 31, eager_step_s=39e-3, graph_tokens=8192),
}


@dataclass(frozen=True, slots=True)
class WithOverhead:
    """Implements `StepCost`."""

    cost: StepCost
    overhead: Overhead

    def seconds(self, prefill: Sequence[Prefill], decode: Sequence[int]) -> float:
        seconds = self.cost.seconds(prefill, decode)
        if not seconds:
            return 0.0
        if prefill or max(decode) > self.overhead.graph_tokens:
            seconds = max(seconds, self.overhead.eager_step_s)
        return seconds + self.overhead.sequence_s * (len(prefill) + len(decode))
