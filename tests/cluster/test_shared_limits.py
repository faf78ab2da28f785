"""Two conductors, one Redis: a tenant has its limits once, whoever answers and whoever dies."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import httpx
import pytest

from tests.cluster.by_hand import Conductor, by_hand, until
from tests.redis_server import BINARY, WHY_NOT

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.skipif(BINARY is None, reason=WHY_NOT),
]

REQUESTS = 7
TENANTS = f"""
tenants:
  - name: search
    limits: {{requests_per_minute: {REQUESTS}}}
  - name: others
"""


def key_of(tenant: str, keys: Path) -> str:
    create = [sys.executable, "-m", "baton", "keys", "create", tenant, "--file", str(keys)]
    said = subprocess.run(create, capture_output=True, text=True, check=True).stdout
    (key,) = (word for word in said.split() if word.startswith("bt-"))
    return key


def ask(conductor: Conductor, key: str) -> httpx.Response:
    return httpx.post(
        f"http://{conductor.http}/v1/completions",
        json={"model": "demo", "prompt": "def f(", "max_tokens": 2},
        headers={"Authorization": f"Bearer {key}"},
        timeout=100.0,
        trust_env=False,
    )


def test_a_limit_is_one_for_all_conductors_and_outlives_them(tmp_path: Path) -> None:
    tenants, keys = tmp_path / "tenants.yaml", tmp_path / "keys.txt"
    tenants.write_text(TENANTS)
    limited, other = key_of("search", keys), key_of("others", keys)
    flags = ("--tenants", str(tenants), "--keys", str(keys))
    with by_hand(tmp_path) as cluster:
        one, two = cluster.conductor("c-1", *flags), cluster.conductor("c-2", *flags)
        cluster.worker("decode", "decode-0")
        until(lambda: one.sees_live("decode-0") and two.sees_live("decode-0"))

        turns = islice(cycle((one, two)), REQUESTS + 3)
        answers = Counter(ask(conductor, limited).status_code for conductor in turns)
        assert answers == {200: REQUESTS, 429: 3}

        cluster.kill("c-1")
        refused = ask(two, limited)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 0 < int(refused.headers["retry-after"]) <= 60
        assert ask(two, other).status_code == 200
        assert set(cluster.stop_all().values()) == {0}
