"""What loads ask: sessions of one or more turns, made from a seed.

A turn's prompt is everything said before in its session, answers included, and then its own tokens.
The same arguments give the same sessions on every machine; answers ignore end-of-sequence, so that
every run generates the same number of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.bench.trace import BLOCK_TOKENS, TraceRequest


@dataclass(frozen=True, slots=True)
class Turn:
    """`tokens` come after everything said so far in the session."""

    tokens: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Session:
    """`at_s`: when its first turn arrives in an open loop, if the workload says so."""

    turns: tuple[Turn, ...]
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens, uniform in [length * (1 - spread), length * (1 + spread)].

    Each session begins with one of `groups` prefixes of `shared_prefix` tokens, and has `turns`
    turns of `input_tokens` new tokens and an answer.
    """

    input_tokens: int
    output_tokens: int
    vocab_size: int
    shared_prefix: int = 0
    spread: float = 0.0
    seed: int = 0
    groups: int = 1
    turns: int = 1


def make_sessions(shape: Shape, requests: int) -> list[Session]:
    """As many sessions as make `requests` turns; the last one may be shorter."""
    generator = random.Random(shape.seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(shape.vocab_size) for _ in range(length))

    def length(mean: int) -> int:
        low, high = round(mean * (1 - shape.spread)), round(mean * (1 + shape.spread))
        return max(1, generator.randint(low, high))

    prefixes = [tokens(shape.shared_prefix) for _ in range(shape.groups)]
    sessions: list[Session] = []
    while requests > 0:
        turns: list[Turn] = []
        for number in range(min(shape.turns, requests)):
            given, out = length(shape.input_tokens), length(shape.output_tokens)
            prefix = prefixes[len(sessions) % shape.groups] if number == 0 else ()
            turns.append(Turn(prefix + tokens(given), out))
        sessions.append(Session(tuple(turns)))
        requests -= len(turns)
    return sessions


@dataclass(frozen=True, slots=True)
class TraceScale:
    """How a recorded trace is made small enough. `tokens`: share of all lengths; `time`: seconds of
    the run per recorded second; answers have at most `max_output` tokens, prompts `max_input`."""

    tokens: float = 1 / 16
    time: float = 1.0
    max_input: int = 8192
    max_output: int = 256


def trace_sessions(
    requests: Sequence[TraceRequest], scale: TraceScale, vocab_size: int, seed: int
) -> list[Session]:
    """One session of one turn per recorded request. A block id becomes the same tokens wherever it
    appears, so prompts share prefixes as the recorded ones did."""
    block = max(1, round(BLOCK_TOKENS * scale.tokens))
    first = requests[0].at_s if requests else 0.0
    sessions = []
    for number, request in enumerate(requests):
        given = min(scale.max_input, max(1, round(request.input_tokens * scale.tokens)))
        out = min(scale.max_output, max(1, round(request.output_tokens * scale.tokens)))
        prompt = tuple(_trace_prompt(request, number, given, block, vocab_size, seed))
        at_s = (request.at_s - first) * scale.time
        sessions.append(Session((Turn(prompt, out),), at_s))
    return sessions


def _trace_prompt(
    request: TraceRequest, number: int, length: int, block: int, vocab_size: int, seed: int
) -> Iterator[int]:
    """Recorded blocks as far as there are ids; then tokens that no other request has."""
    for block_id in request.blocks[: -(-length // block)]:
        generator = random.Random(f"{seed}/{block_id}")
        for _ in range(min(block, length)):
            yield generator.randrange(vocab_size)
        length -= min(block, length)
    generator = random.Random(f"{seed}/own/{number}")
    for _ in range(length):
        yield generator.randrange(vocab_size)
