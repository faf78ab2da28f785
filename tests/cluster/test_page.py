"""The live page in a real Chromium, on a real cluster of the demo model."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Cluster
from tests.fake_worker import FakeCluster
from tests.tenants_kit import Files, key_of

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE_MS = 60_000.0
LIVE = 'body[data-connection="live"]'
AUDIT = (Path(__file__).parent / "audit.js").read_text()
NARROW = {"width": 360, "height": 740}
SIZES = """(() => {
  window.lengths = [];
  const answer = document.getElementById("answer");
  const note = () => lengths.push(answer.textContent.length);
  new MutationObserver(note).observe(answer, { characterData: true, subtree: true });
})()"""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Any, url: str, clean: bool = True, **options: Any) -> Iterator[Any]:
    """The page, once it is live. `clean`: nothing may go wrong in its console or its requests."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    wrong: list[str] = []
    if clean:
        page.on("console", lambda message: _note(wrong, message))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("requestfailed", lambda request: _note_failure(wrong, request))
        page.on("response", lambda answer: _note_status(wrong, answer))
    try:
        page.goto(url)
        page.wait_for_selector(LIVE)
        yield page
        assert wrong == []
    finally:
        context.close()


def _note(wrong: list[str], message: Any) -> None:
    if message.type in ("error", "warning"):
        wrong.append(f"console: {message.text}")


def _note_failure(wrong: list[str], request: Any) -> None:
    if "ERR_ABORTED" not in (request.failure or ""):  # the page lets go of streams itself
        wrong.append(f"failed: {request.url} {request.failure}")


def _note_status(wrong: list[str], answer: Any) -> None:
    if answer.status >= 400:
        wrong.append(f"{answer.status}: {answer.url}")


def text_of(page: Any, selector: str) -> str:
    return str(page.inner_text(selector))


def until(page: Any, condition: str, argument: Any = None) -> None:
    """Not playwright's own wait, which the page's policy forbids: it evaluates strings in there."""
    deadline = time.monotonic() + PATIENCE_MS / 1e3
    while not page.evaluate(condition, argument):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


def send(page: Any, prompt: str, max_tokens: int) -> None:
    page.fill("#prompt-text", prompt)
    page.fill("#prompt-max", str(max_tokens))
    page.click("#prompt-send")


def test_it_loads_and_shows_the_fleet(browser: Any, cluster: Cluster) -> None:
    with page_of(browser, cluster.url) as page:
        assert page.title() == "demo – baton"
        assert text_of(page, "h1") == "baton"
        assert text_of(page, "#cluster-state") == "● ready"
        for name, role in [("prefill-0", "prefill"), ("decode-0", "decode")]:
            card = f'#{role} [data-member="{name}"]'
            until(page, "s => document.querySelector(s)?.dataset.state === 'live'", card)
            assert "free" in text_of(page, f"{card} .blocks")
            pid = next(w["pid"] for w in cluster.status()["workers"] if w["name"] == name)
            assert f"pid {pid}" in text_of(page, f"{card} .where")
        assert not page.is_visible("#store-pool")
        assert not page.is_visible("#key-form")


def test_figures_and_requests_follow_the_cluster(browser: Any, cluster: Cluster) -> None:
    with page_of(browser, cluster.url) as page:
        before = requests_in(page)
        body = {"model": "demo", "prompt": "def update(self):", "max_tokens": 8}
        answer = cluster.post("/v1/completions", body | {"ignore_eos": True}).json()
        until(page, f"({REQUESTS})() === {before + 1}")
        row = f'tbody:has(button[data-id="{answer["id"]}"])'
        until(page, "s => document.querySelector(s)?.innerText.includes('ok')", row)
        assert "prefill-0 → decode-0" in text_of(page, row) or "decode-0" in text_of(page, row)
        assert re.search(r"\d m?s", text_of(page, ".figure >> nth=0"))
        until(page, "document.querySelector('.spark .line').getAttribute('points') !== null")
        page.check('input[value="300"]')
        until(page, f"({REQUESTS})() >= {before + 1}")


REQUESTS = r"""() => Number(/([\d,]+) request/.exec(
    document.querySelectorAll('.figure')[4].innerText)[1].replace(',', ''))"""


def requests_in(page: Any) -> int:
    return int(page.evaluate(REQUESTS))


def test_a_prompt_streams_and_its_timeline_opens(browser: Any, cluster: Cluster) -> None:
    with page_of(browser, cluster.url) as page:
        page.evaluate(SIZES)
        send(page, "def fibonacci(n):", 48)
        until(page, "document.getElementById('answer').getAttribute('aria-busy') === 'false'")
        lengths = page.evaluate("window.lengths")
        assert len(lengths) >= 3
        assert lengths == sorted(lengths)
        assert text_of(page, "#answer").strip()
        figures = text_of(page, "#answer-figures")
        assert re.search(r"TTFT .* · \d+ tokens? from \d+ · .* tokens/s · \d+ cached", figures)
        page.click("#answer-figures a")
        page.wait_for_selector(".waterfall tbody tr")
        assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
        shown = text_of(page, ".timeline")
        assert re.search(r"prefill\s+[\d.]+ m?s", shown), shown
        assert "TTFT" in shown
        assert page.locator(".stages span").count() >= 3


def test_a_chat_streams_too_and_can_be_stopped(browser: Any, cluster: Cluster) -> None:
    with page_of(browser, cluster.url) as page:
        page.select_option("#prompt-kind", "chat")
        send(page, "Write a function that adds two numbers.", 24)
        until(page, "document.getElementById('answer').textContent.length > 0")
        until(page, "document.getElementById('answer').getAttribute('aria-busy') === 'false'")
        page.select_option("#prompt-kind", "completion")
        send(page, "def add(a, b):", 1500)
        until(page, "document.getElementById('answer').textContent.length > 0")
        page.click("#prompt-stop")
        until(page, "document.getElementById('answer-figures').innerText.includes('stopped')")
        assert page.is_enabled("#prompt-send")
    cluster.assert_idle()


def test_what_is_wrong_with_a_prompt_is_said(browser: Any, cluster: Cluster) -> None:
    with page_of(browser, cluster.url, clean=False) as page:
        send(page, "x", 999_999)
        until(page, "document.getElementById('answer-figures').innerText.includes('context')")
        assert page.is_enabled("#prompt-send")


def test_text_cannot_become_markup(browser: Any, cluster: Cluster) -> None:
    with page_of(browser, cluster.url, clean=False) as page:
        body = {"model": "demo", "prompt": "x", "max_tokens": 1, "request_id": "a.b:c-1"}
        assert cluster.post("/v1/completions", body).status_code == 200
        until(page, "document.querySelector('button[data-id=\"a.b:c-1\"]') !== null")
        page.click('button[data-id="a.b:c-1"]')
        page.wait_for_selector(".waterfall")
        refused = page.evaluate(
            "() => { try { document.body.innerHTML = '<b>x</b>'; } catch (e) { return e.name; } }"
        )
        assert refused == "TypeError"  # the page's policy: no text becomes markup


def test_it_can_be_used_by_keyboard(browser: Any, cluster: Cluster) -> None:
    with page_of(browser, cluster.url) as page:
        page.wait_for_selector('#decode [data-state="live"]')
        focused = "(e => e.id || e.className || e.name || e.tagName)(document.activeElement)"
        order = []
        for _ in range(10):
            page.keyboard.press("Tab")
            order.append(page.evaluate(focused))
        assert order == [
            "skip", "period", "flow-summary", "prompt-text", "prompt-kind", "prompt-max",
            "prompt-temperature", "prompt-send", "answer", "plain",
        ]  # fmt: skip
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        page.keyboard.press("Enter")
        page.wait_for_selector(".waterfall")
        page.focus("#prompt-text")
        page.keyboard.press("Control+a")
        page.keyboard.type("import os")
        page.keyboard.press("Control+Enter")
        until(page, "document.getElementById('answer').textContent.length > 0")
        until(page, "document.getElementById('answer').getAttribute('aria-busy') === 'false'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_contrast_and_structure(browser: Any, cluster: Cluster, scheme: str) -> None:
    with page_of(browser, cluster.url, color_scheme=scheme) as page:
        page.click("button.plain >> nth=0")
        page.wait_for_selector(".waterfall")
        page.click("#flow-summary")
        assert page.evaluate(AUDIT) == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        bright = sum(int(part) for part in re.findall(r"\d+", ground)) > 3 * 128
        assert bright is (scheme == "light")


def test_it_fits_a_phone_and_moves_nothing_when_asked(browser: Any, cluster: Cluster) -> None:
    options: dict[str, Any] = {"viewport": NARROW, "reduced_motion": "reduce", "has_touch": True}
    with page_of(browser, cluster.url, **options) as page:
        send(page, "def " + 40 * "x", 16)
        until(page, "document.getElementById('answer').getAttribute('aria-busy') === 'false'")
        page.click("#answer-figures a")
        page.wait_for_selector(".waterfall")
        page.click("#flow-summary")
        wide = "[...document.querySelectorAll('body *')].filter(e => "
        wide += "e.getBoundingClientRect().right > innerWidth + 1 && e.checkVisibility() && "
        wide += "!e.closest('thead'))"  # which is out of sight there
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
        assert page.evaluate(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []
        page.wait_for_selector(".flow .pulse", state="attached")
        moving = "getComputedStyle(document.querySelector('.flow .pulse')).animationName"
        assert page.evaluate(moving) == "none"


def test_a_killed_worker_shows_as_dead(browser: Any, cluster: Cluster) -> None:
    worker = subprocess.Popen(
        [
            *(sys.executable, "-m", "decode_worker", "--name", "decode-9", "--threads", "1"),
            *("--conductor", cluster.grpc, "--kv-memory-mib", "16"),
        ],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            "BATON_CLUSTER_TOKEN": cluster.token,
            "TMPDIR": str(cluster.directory),
        },
    )
    try:
        with page_of(browser, cluster.url) as page:
            card = '[data-member="decode-9"]'
            page.wait_for_selector(f'{card}[data-state="live"]')
            assert "2 decode" in text_of(page, "#fleet-summary")
            worker.kill()
            page.wait_for_selector(f'{card}[data-state="dead"]')
            assert "✕" in text_of(page, f"{card} .state")
            assert "1 not live" in text_of(page, "#fleet-summary")
            assert text_of(page, "#cluster-state") == "● ready"
    finally:
        worker.kill()
        worker.wait(60)


def test_it_comes_back_with_the_conductor(browser: Any, cluster: Cluster) -> None:
    (conductor,) = cluster.status()["conductors"]
    body = {"model": "demo", "prompt": "def add(a, b):", "max_tokens": 600, "temperature": 0.0}
    whole = cluster.post("/v1/completions", body).json()["choices"][0]["text"]
    with page_of(browser, cluster.url, clean=False) as page:
        page.fill("#prompt-temperature", "0")
        send(page, "def add(a, b):", 600)
        until(page, "document.getElementById('answer').textContent.length > 40")
        os.kill(conductor["pid"], signal.SIGKILL)
        until(page, f"{FIGURES}.includes('▲ reconnecting')")
        page.wait_for_selector('body[data-connection="reconnecting"]')
        assert "reconnecting" in text_of(page, "#connection")
        page.wait_for_selector(LIVE)
        until(page, "document.getElementById('cluster-state').textContent === '● ready'")
        for name in ("prefill-0", "decode-0"):
            page.wait_for_selector(f'[data-member="{name}"][data-state="live"]')
        until(page, NOT_BUSY)
        assert answer_of(page) == whole


class Scripted:
    """Answers the page's prompts in the cluster's place: each connection gets the next step, and
    every one after the last step gets that again."""

    def __init__(self, page: Any, *steps: Callable[[Any], None]) -> None:
        self.requests: list[Any] = []
        self._steps = steps
        page.route("**/v1/completions", self._answer)

    def _answer(self, route: Any) -> None:
        self.requests.append(route.request)
        self._steps[min(len(self.requests), len(self._steps)) - 1](route)

    @property
    def last_ids(self) -> list[str | None]:
        return [request.headers.get("last-event-id") for request in self.requests]


def answer_of(page: Any) -> str:
    return str(page.evaluate("document.getElementById('answer').textContent"))


def hurry_until(page: Any, condition: str) -> None:
    """With the page's clock going ten times as fast."""
    deadline = time.monotonic() + PATIENCE_MS / 1e3
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.clock.run_for(500)
        page.wait_for_timeout(50)


def events(*texts: str, done: bool = False) -> Callable[[Any], None]:
    """A connection that brings so much and ends."""
    chunks = [
        f'id: after-{text}\ndata: {{"id": "r", "choices": [{{"index": 0, "text": "{text} "}}]}}\n\n'
        for text in texts
    ]
    body = "".join(chunks) + ("data: [DONE]\n\n" if done else "")
    return lambda route: route.fulfill(body=body, content_type="text/event-stream")


def failure(status: int, kind: str = "") -> Callable[[Any], None]:
    """0: nobody listens; 200: an event in the stream."""
    error = f'{{"error": {{"message": "not now", "type": "{kind}"}}}}'
    if status == 0:
        return lambda route: route.abort("connectionrefused")
    if status == 200:
        return lambda route: route.fulfill(
            body=f"data: {error}\n\n", content_type="text/event-stream"
        )
    return lambda route: route.fulfill(status=status, body=error)


FIGURES = "document.getElementById('answer-figures').textContent"
NOT_BUSY = "document.getElementById('answer').getAttribute('aria-busy') === 'false'"


def test_a_broken_stream_goes_on_behind_its_last_event(browser: Any, cluster: Cluster) -> None:
    with page_of(browser, cluster.url, clean=False) as page:
        script = Scripted(
            page,
            events("one", "two"),
            failure(0),
            failure(503),
            events("three"),
            failure(200, "service_unavailable_error"),
            events("four", done=True),
        )
        send(page, "count", 8)
        until(page, f"{FIGURES}.includes('▲ reconnecting')")
        assert page.evaluate(NOT_BUSY) is False
        assert page.is_enabled("#prompt-stop")
        until(page, NOT_BUSY)
        assert answer_of(page) == "one two three four "
        assert "TTFT" in text_of(page, "#answer-figures")
        assert "reconnecting" not in text_of(page, "#answer-figures")
        assert script.last_ids == [None, *3 * ["after-two"], *2 * ["after-three"]]
        assert len({request.post_data for request in script.requests}) == 1


def test_a_stream_is_given_up_when_stopped_refused_or_tried_often(
    browser: Any, cluster: Cluster
) -> None:
    with page_of(browser, cluster.url, clean=False) as page:
        page.clock.install()
        script = Scripted(page, failure(0))
        send(page, "count", 8)
        until(page, f"{FIGURES}.includes('cannot be reached')")
        assert script.last_ids == [None]  # nobody knows of it: nothing to go on with
        page.unroute("**/v1/completions")

        script = Scripted(page, events("one"), failure(400))
        send(page, "count", 8)
        hurry_until(page, f"{FIGURES}.includes('not now')")
        assert script.last_ids == [None, "after-one"]
        page.unroute("**/v1/completions")

        script = Scripted(page, events("one"), failure(0))
        send(page, "count", 8)
        until(page, f"{FIGURES}.includes('reconnecting')")
        page.click("#prompt-stop")
        until(page, f"{FIGURES}.includes('stopped')")
        assert script.last_ids == [None]
        page.unroute("**/v1/completions")

        script = Scripted(page, events("one"), failure(0))
        send(page, "count", 8)
        hurry_until(page, NOT_BUSY)
        assert len(script.requests) == 11
        assert answer_of(page) == "one "
        assert "cannot be reached" in text_of(page, "#answer-figures")


def test_a_key_is_asked_for_and_kept(browser: Any, tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write_tenants({"name": "somebody"}, {"name": "boss", "admin": True})
    with host(files.server) as url:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.wait_for_selector("#key-form:not([hidden])")
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('key-why').innerText.includes('does not know')")
        page.fill("#key", key_of("somebody"))
        page.click("#key-form button")
        page.wait_for_selector('body[data-connection="forbidden"]')
        until(page, "document.getElementById('key-why').innerText.includes('admin')")
        send(page, "hello", 8)
        until(page, "document.getElementById('answer').textContent === 'hello'")
        page.fill("#key", key_of("boss"))
        page.click("#key-form button")
        page.wait_for_selector(LIVE)
        assert not page.is_visible("#key-form")
        page.reload()
        page.wait_for_selector(LIVE)
        send(page, "hello", 8)
        until(page, "document.getElementById('answer').textContent === 'hello'")
        context.close()


@contextmanager
def host(make: Callable[[], Any]) -> Iterator[str]:
    """A conductor with fake workers, in a loop of another thread; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = make()
    try:
        started: FakeCluster = _run(loop, server.__aenter__())
        yield started.url
        _run(loop, server.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


def _run(loop: asyncio.AbstractEventLoop, work: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(work, loop).result(60)
