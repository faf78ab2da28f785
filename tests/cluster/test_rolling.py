"""A small part of `make rolling`: processes are restarted under load, no request fails."""

from __future__ import annotations

import pytest

from bench.chaos.cluster import Shape
from bench.chaos.questions import Questions, make_questions
from bench.rolling.report import as_markdown
from bench.rolling.run import run
from tests.redis_server import BINARY, WHY_NOT

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(BINARY is None, reason=WHY_NOT),
]

RESTARTED = ("conductor-0", "decode-0", "prefill-0", "store-0")


async def test_processes_are_restarted_under_load_and_no_request_fails() -> None:
    asked = make_questions(0)
    few = Questions(asked.marked[:1], (), asked.others[:6])
    shape = Shape(prefill=1, lease_ttl_s=10.0)  # meanwhile decode workers compute prompts
    result = await run(shape, few, RESTARTED, clients=(2, 1), undisturbed=4)
    assert [restart.name for restart in result.restarts] == list(RESTARTED)
    assert all(result.during(restart) for restart in result.restarts)
    assert result.good, as_markdown("", result)
