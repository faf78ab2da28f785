"""What steps take: the counts, the limits that bind, and published points."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigError
from sim.costs.capacity import kv_capacity_blocks
from sim.costs.compute import (
    Prefill,
    Roofline,
    attention_flops,
    paper_flops,
    prefill_flops,
)
from sim.costs.machines import MACHINES, machine_named, with_network
from sim.costs.models import MODELS, model_named

LLAMA3 = MODELS["llama3-70b"]
A800 = MACHINES["8xA800"]
ROOFLINE = Roofline(LLAMA3, A800, 8)


def test_parameters_are_those_that_the_models_are_named_for() -> None:
    billions = {name: spec.params / 1e9 for name, spec in MODELS.items()}
    assert billions == {
        "llama2-70b": pytest.approx(69.0, abs=0.1),
        "llama3-70b": pytest.approx(70.6, abs=0.1),
        "llama3-8b": pytest.approx(8.03, abs=0.01),
        "qwen3-8b": pytest.approx(8.19, abs=0.01),
        "qwen3-0.6b": pytest.approx(0.596, abs=0.001),
        "small": pytest.approx(0.032, abs=0.001),
    }


def test_kv_of_a_token_is_what_the_papers_say() -> None:
    assert LLAMA3.kv_bytes_per_token == 320 * 1024  # FAST'25, section 5.3.1
    assert MODELS["qwen3-8b"].kv_bytes_per_token == 147_456
    assert MODELS["qwen3-0.6b"].kv_bytes_per_token == 114_688


def test_unknown_names_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="llama3-70b"):
        model_named("gpt")
    with pytest.raises(ConfigError, match="8xH200"):
        machine_named("toaster")
    assert model_named("llama3-70b") is LLAMA3
    assert machine_named("8xA800") is A800


@pytest.mark.parametrize(("machine", "gb_per_s"), [("8xA800", 6), ("8xH800", 19)])
def test_bandwidth_from_which_reuse_pays_is_that_of_the_paper(
    machine: str, gb_per_s: float
) -> None:
    """FAST'25, equation 2: LLaMA3-70B, prefix of 8,192 tokens, peak rates."""
    node = MACHINES[machine]
    seconds = paper_flops(LLAMA3, 8192) / (node.gpus * node.gpu.flops)
    assert round(8192 * LLAMA3.kv_bytes_per_token / seconds / 1e9) == gb_per_s


def test_the_exact_count_and_the_papers_cross_at_fourteen_thousand_tokens() -> None:
    def ratio(tokens: int) -> float:
        return prefill_flops(LLAMA3, tokens) / paper_flops(LLAMA3, tokens)

    assert ratio(8192) == pytest.approx(1.06, abs=0.01)
    assert ratio(14_336) == pytest.approx(1.0, abs=0.005)
    assert ratio(131_072) == pytest.approx(0.67, abs=0.01)


def test_a_cached_prefix_and_chunks_cost_what_is_left_of_the_whole() -> None:
    whole = attention_flops(LLAMA3, 8192)
    chunks = [attention_flops(LLAMA3, 2048, start) for start in range(0, 8192, 2048)]
    assert sum(chunks) == pytest.approx(whole)
    assert paper_flops(LLAMA3, 2048, 6144) + paper_flops(LLAMA3, 6144) == pytest.approx(
        paper_flops(LLAMA3, 8192)
    )


def test_an_empty_step_takes_no_time() -> None:
    assert ROOFLINE.seconds([], []) == 0.0


def test_small_chunks_are_less_efficient() -> None:
    """Weights are read whole for every chunk, however small."""

    def per_token(tokens: int) -> float:
        return ROOFLINE.seconds([Prefill(tokens)], []) / tokens

    assert per_token(32) > 3 * per_token(512) > 3 * per_token(2048)


def test_a_small_step_takes_as_long_as_reading_the_weights() -> None:
    gpu = A800.gpu
    read = LLAMA3.step_weight_bytes / 8 / gpu.hbm_bytes_per_s / gpu.decode_efficiency
    one = ROOFLINE.seconds([], [1])
    assert one > read
    assert one - read < 0.02


def test_decode_grows_with_the_kv_that_it_reads_and_hardly_with_sequences() -> None:
    few, many = ROOFLINE.seconds([], [1000] * 8), ROOFLINE.seconds([], [1000] * 64)
    long = ROOFLINE.seconds([], [8000] * 64)
    assert many < 1.3 * few
    kv = 64 * 7000 * LLAMA3.kv_bytes_per_token / 8
    assert long - many == pytest.approx(kv / A800.gpu.hbm_bytes_per_s / A800.gpu.kv_efficiency)


def test_a_prompt_with_decodes_shares_weights_but_not_the_rest() -> None:
    """The mixed step is shorter than both apart, longer than either."""
    prompt, decodes = [Prefill(512, 4096)], [2000] * 32
    both = ROOFLINE.seconds(prompt, decodes)
    alone = ROOFLINE.seconds(prompt, []), ROOFLINE.seconds([], decodes)
    assert max(alone) < both < sum(alone)


PARTS = st.builds(Prefill, st.integers(1, 9000), st.integers(0, 100_000))
STEPS = st.tuples(st.lists(PARTS, max_size=4), st.lists(st.integers(1, 100_000), max_size=64))
Step = tuple[list[Prefill], list[int]]


@settings(deadline=None)
@given(STEPS, STEPS)
def test_one_step_of_two_is_no_longer_than_both_and_no_shorter_than_either(
    one: Step, two: Step
) -> None:
    together = ROOFLINE.seconds(one[0] + two[0], one[1] + two[1])
    apart = ROOFLINE.seconds(*one), ROOFLINE.seconds(*two)
    assert max(apart) <= together * (1 + 1e-9)
    assert together <= sum(apart) * (1 + 1e-9)


@settings(deadline=None)
@given(PARTS, st.integers(64, 9000))
def test_chunks_of_a_prompt_take_longer_than_the_whole(part: Prefill, size: int) -> None:
    starts = range(0, part.new, size)
    chunks = [Prefill(min(size, part.new - at), part.context + at) for at in starts]
    whole = ROOFLINE.seconds([part], [])
    assert sum(ROOFLINE.seconds([chunk], []) for chunk in chunks) >= whole * (1 - 1e-9)


def test_tensor_parallel_groups_are_faster_but_not_by_their_size() -> None:
    step = [Prefill(4096)]
    four, eight = Roofline(LLAMA3, A800, 4), Roofline(LLAMA3, A800, 8)
    assert 1.0 < four.seconds(step, []) / eight.seconds(step, []) < 2.0
    assert 1.0 < four.seconds([], [8000] * 16) / eight.seconds([], [8000] * 16) < 2.0


def test_more_gpus_than_kv_heads_hold_copies() -> None:
    spec = replace(LLAMA3, kv_heads=4)
    steps = [8000] * 64
    four, eight = Roofline(spec, A800, 4), Roofline(spec, A800, 8)
    weights = Roofline(spec, A800, 4).seconds([], [0] * 64), eight.seconds([], [0] * 64)
    assert four.seconds([], steps) - weights[0] == pytest.approx(
        eight.seconds([], steps) - weights[1]
    )


def test_kv_capacity_of_a_node() -> None:
    """A token of LLaMA3-70B is 320 KiB: 8×80 GB less a tenth and 141 GB of weights holds 1.3
    million."""
    assert kv_capacity_blocks(LLAMA3, A800, 8, 512) * 512 == pytest.approx(1.327e6, rel=0.01)


def test_kv_heads_that_gpus_share_take_their_memory_twice() -> None:
    spec = replace(LLAMA3, kv_heads=4)
    shared = kv_capacity_blocks(spec, A800, 8, 512)
    assert shared == pytest.approx(kv_capacity_blocks(LLAMA3, A800, 8, 512), rel=0.02)


def test_model_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="141 GB"):
        kv_capacity_blocks(LLAMA3, A800, 1, 512)


def test_network_of_a_node_can_be_swept() -> None:
    node = with_network(A800, 100)
    assert node.nic_bytes_per_s == pytest.approx(100e9 / 8 * 0.87)
    assert node.gpu is A800.gpu
