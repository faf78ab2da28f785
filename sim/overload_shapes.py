"""What is asked of the cluster of `sim.overload`, and what that is made of.

Steps take a hundredth of a second and more, as on slow CPUs, so that few requests are overload.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from baton.kv.digest import Verify
from conductor.admission import Slos
from sim.plan import CONDUCTOR, Machine, Shape
from sim.runner import VOCAB
from sim.steps import Pace

_PREFILL = Pace(step_s=0.01, token_s=0.002, queued=False)  # ten prompts of 48 tokens per second
_DECODE = Pace(step_s=0.02, token_s=0.0005, queued=False)
_SLOW_DECODE = Pace(step_s=0.04, token_s=0.004, queued=False)  # 15 sequences take 0.1 s
_PREFIXES = 4
_SLOS = Slos(ttft_s=1.0, tpot_s=0.1)


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths in tokens, uniform from the first to the second. The first `shared` tokens of a
    prompt are one of four prefixes; the rest is its own. `burst` requests come at a time."""

    name: str
    prompt: tuple[int, int] = (48, 48)
    answer: tuple[int, int] = (24, 24)
    shared: int = 0
    burst: int = 1
    slos: Slos = _SLOS
    pairs: int = 1  # of a prefill and a decode worker
    decode: Pace = _DECODE
    at_once: int = 12  # of the closed loop that finds the capacity

    def asks(self, seed: int) -> Iterator[tuple[tuple[int, ...], int]]:
        """Prompts, and how many tokens their answers have."""
        draw = Random(seed)
        prefixes = [_tokens(draw, self.shared) for _ in range(_PREFIXES)]
        while True:
            prompt = draw.choice(prefixes) if self.shared else ()
            prompt += _tokens(draw, draw.randint(*self.prompt) - self.shared)
            yield prompt, draw.randint(*self.answer)

    def cluster(self) -> Shape:
        return Shape(
            prefill=tuple(Machine(f"p{n}", 2048, _PREFILL) for n in range(self.pairs)),
            decode=tuple(Machine(f"d{n}", 2048, self.decode) for n in range(self.pairs)),
            stores=(),
            conductors=(Machine(CONDUCTOR, 1, _PREFILL),),
            num_layers=2,
            layer_groups=1,
            max_num_seqs=32,
            max_batch_tokens=64,
            prefix_caching=True,
            verify=Verify.OFF,
            local_tokens=0,
            fleet_ttl_s=3.0,
            lease_ttl_s=1.5,
            max_model_len=512,
        )


def _tokens(draw: Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(VOCAB) for _ in range(count))


WORKLOADS = (
    Workload("even"),
    Workload("short prompts", prompt=(8, 16), answer=(4, 12)),
    Workload("long prompts", prompt=(200, 400), slos=Slos(ttft_s=4.0, tpot_s=0.1)),
    Workload("short and long", prompt=(8, 300), slos=Slos(ttft_s=3.0, tpot_s=0.1)),
    Workload("bursts of 20", burst=20),
    Workload("shared prefixes", shared=32),
    Workload("decoding is slow", answer=(24, 64), decode=_SLOW_DECODE, at_once=16),
    Workload("two pairs", pairs=2, at_once=24),
    Workload("tight SLO", slos=Slos(ttft_s=0.4, tpot_s=0.1), at_once=4),
)
