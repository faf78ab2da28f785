"""Clients that stream on while something happens to the cluster, and what they were told."""

from __future__ import annotations

import threading

import httpx

from tests.cluster.ray_nodes import PATIENCE_S, until

PROMPTS = ("def fibonacci(n):", "import os\n", "class Stack:\n", "for i in range(10):")
TOKENS = 40

Answers = dict[str, str]


class Load:
    """Asks the same prompts again and again, in so many streams at a time. `pause_s`, after each
    answer, leaves the machine to what is being started."""

    def __init__(self, url: str, streams: int = len(PROMPTS), pause_s: float = 0.0) -> None:
        self.answers: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self._url = url
        self._pause_s = pause_s
        self._enough = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(PROMPTS[i % len(PROMPTS)],))
            for i in range(streams)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def wait_for_more(self) -> None:
        """As many answers as there are streams."""
        before = len(self.answers)
        enough = before + len(self._threads)
        until(lambda: len(self.answers) >= enough, lambda: f"no answers: {self.errors[-3:]}")

    def assert_right(self, expected: Answers) -> None:
        assert not self.errors
        assert set(self.answers) == set(expected.items())

    def _ask_on(self, prompt: str) -> None:
        while not self._enough.is_set():
            try:
                self.answers.append((prompt, ask(self._url, prompt)))
            except (httpx.HTTPError, AssertionError) as error:
                self.errors.append(f"{prompt!r}: {error}")
            self._enough.wait(self._pause_s)


def ask(url: str, prompt: str) -> str:
    body = {
        **{"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0},
        **{"ignore_eos": True, "seed": 1},
    }
    url = f"{url}/v1/completions"
    # `verify` would have each call read all certificates first.
    reply = httpx.post(url, json=body, timeout=100.0, trust_env=False, verify=False)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == TOKENS
    return str(reply.json()["choices"][0]["text"])
