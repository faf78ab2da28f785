"""The benchmark's loads follow from the seed, and rounds share no prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.bench.trace import TraceRequest, spread
from baton.errors import ConfigError
from bench.client import Ask
from bench.shapes import FIRST_WORD, SHAPES, word
from bench.trace import INPUT_LIMIT, read_trace
from bench.workloads import WORKLOADS, Arrivals, Interference, Load, Setting, Sweep, Waves

TRACE = tuple(TraceRequest(i * 0.5, 10 + i % 7, 1 + i % 5) for i in range(1000))
SETTING = Setting(vocab=8192, trace=TRACE)


def asks_of(load: Load) -> list[Ask]:
    match load:
        case Waves():
            return [ask for wave in load.waves for ask in wave]
        case Sweep():
            return [ask for _, asks in load.steps for ask in asks]
        case Arrivals():
            return [*load.asks, *load.calibration]
        case Interference():
            return [*load.streams, load.long]


@pytest.mark.parametrize("name", WORKLOADS)
def test_loads_follow_from_the_seed(name: str) -> None:
    build = WORKLOADS[name].build
    assert build(SETTING, 2) == build(SETTING, 2)
    rounds = [asks_of(build(SETTING, round_)) for round_ in range(3)]
    prompts = [ask.prompt for asks in rounds for ask in asks]
    assert len(set(prompts)) == len(prompts)
    assert all(FIRST_WORD <= token < 8192 for prompt in prompts for token in prompt)


@pytest.mark.parametrize("name", WORKLOADS)
def test_quick_loads_are_smaller(name: str) -> None:
    def tokens(quick: bool) -> int:
        load = WORKLOADS[name].build(Setting(8192, quick=quick, trace=TRACE), 0)
        return sum(len(ask.prompt) + ask.output_tokens for ask in asks_of(load))

    assert tokens(True) < tokens(False)


def test_sizes_are_those_described() -> None:
    batch = WORKLOADS["batch16"].build(SETTING, 0)
    assert isinstance(batch, Waves)
    assert [len(wave) for wave in batch.waves] == [16] * 3
    assert {(len(ask.prompt), ask.output_tokens) for ask in asks_of(batch)} == {(512, 64)}
    shared = asks_of(WORKLOADS["shared"].build(SETTING, 0))
    assert len({ask.prompt[:1024] for ask in shared}) == 1
    assert len({ask.prompt[1024:1040] for ask in shared}) == len(shared) == 32


def test_both_trace_workloads_keep_lengths_and_share_no_tokens() -> None:
    reference, own = (WORKLOADS[name].build(SETTING, 1) for name in ("trace", "trace-own"))
    assert isinstance(reference, Arrivals)
    assert isinstance(own, Arrivals)
    for asks in (reference.asks, own.asks, own.calibration):
        assert [len(ask.prompt) for ask in asks] == [r.input_tokens for r in TRACE[200:400]]
    assert not {ask.prompt for ask in reference.asks} & {ask.prompt for ask in own.asks}
    assert list(reference.at) == sorted(reference.at)
    assert reference.at[-1] == pytest.approx(199)  # one request per second on average


def test_groups_are_spread_up_to_the_next() -> None:
    times = spread([0.0, 0.0, 0.0, 3.0, 9.0, 9.0])
    assert times == sorted(times)
    assert 0 <= times[0] < 1 <= times[1] < 2 <= times[2] < 3 <= times[3] < 9 <= times[4]
    assert times[5] < 9 + 4.5  # the last group takes the mean step
    assert times == spread([0.0, 0.0, 0.0, 3.0, 9.0, 9.0])


def test_traces_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [(0, 160, 8), (0, 1_000_000, 80), (3000, 1, 1)]
    path.write_text(
        "".join(
            json.dumps({"timestamp": at, "input_length": given, "output_length": out}) + "\n"
            for at, given, out in rows
        )
    )
    requests = read_trace(path)
    assert [(r.input_tokens, r.output_tokens) for r in requests] == [
        (10, 1),
        (INPUT_LIMIT, 10),
        (1, 1),
    ]


@pytest.mark.parametrize("content", ["", "{", '{"timestamp": 1}'])
def test_other_files_are_no_traces(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"trace\.jsonl"):
        read_trace(path)


def test_words_are_distinct() -> None:
    assert len({word(token) for token in range(SHAPES["small"].vocab)}) == SHAPES["small"].vocab
