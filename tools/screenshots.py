"""The pictures of the live page in docs/images: `python -m tools.screenshots`.

Starts a cluster of the demo model with a store, talks with it, and looks at the page in Chromium:
in light and dark, on a phone, and after a worker was killed. Needs `chromium` and playwright.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page, async_playwright

from baton.client.http import Client, Prompt
from bench.served import served

CHROMIUM = "/usr/bin/chromium"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
CLUSTER = (
    *("--prefill", "2", "--decode", "2", "--store-memory-mib", "64", "--kv-memory-mib", "64"),
    *("--local-prefill-tokens", "0", "--slo-ttft-ms", "2000", "--slo-tpot-ms", "100"),
)
WORKER = ("--name", "decode-2", "--threads", "1", "--kv-memory-mib", "64", "--dtype", "bfloat16")
TALKERS = 3
WARM_UP_S = 90.0
WAIT_MS = 60_000.0
WIDE = {"width": 1400, "height": 1250}
TALLEST = 1860  # pixels of a whole page that are shown
PHONE = {"width": 390, "height": 844}
LIBRARY = "def {name}(path, mode='r', encoding=None):\n    " + (
    'handle = open(path, mode, encoding=encoding)\n    """Read {name} and check it."""\n    ' * 12
)


async def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    os.environ["BATON_CLUSTER_TOKEN"] = secrets.token_hex(16)
    async with served(CLUSTER) as ready, talking(ready["url"]), async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        async with extra_worker(ready["grpc"]) as worker:
            await asyncio.sleep(WARM_UP_S)
            await shoot(browser, ready["url"], "page-light", WIDE, "light", whole=True)
            await shoot(browser, ready["url"], "page-dark", WIDE, "dark")
            await shoot(browser, ready["url"], "page-phone", PHONE, "light", whole=True)
            worker.kill()
            await shoot(browser, ready["url"], "page-dead", WIDE, "light", dead="decode-2")
        await browser.close()


@asynccontextmanager
async def extra_worker(conductor: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """One that nobody starts again."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "decode_worker", "--conductor", conductor, *WORKER),
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def talking(url: str) -> AsyncIterator[None]:
    """Conversations about a few shared files, so that there are prefixes to be found."""
    async with Client(url) as client, asyncio.TaskGroup() as group:
        talkers = [group.create_task(talk(client, number)) for number in range(TALKERS)]
        yield
        for talker in talkers:
            talker.cancel()


async def talk(client: Client, number: int) -> None:
    for turn in range(1_000_000):
        text = LIBRARY.format(name=f"load_{(number + turn) % 7}") + f"# turn {turn}\n"
        prompt = Prompt(text, max_tokens=48 + 16 * (turn % 3), options={"ignore_eos": True})
        async for _ in client.stream(prompt):
            pass
        await asyncio.sleep(0.4 + 0.3 * number)


async def shoot(
    browser: Browser,
    url: str,
    name: str,
    size: Any,
    scheme: Any,
    whole: bool = False,
    dead: str = "",
) -> None:
    """What fits into the window, or with `whole` about all of the page."""
    context = await browser.new_context(viewport=size, color_scheme=scheme)
    page = await context.new_page()
    await page.goto(url)
    await page.wait_for_selector('body[data-connection="live"]', timeout=WAIT_MS)
    if dead:
        card = f'[data-member="{dead}"][data-state="dead"]'
        await page.wait_for_selector(card, timeout=WAIT_MS)
    await ask(page)
    await page.wait_for_selector(".flow.going", state="attached", timeout=WAIT_MS)
    path = IMAGES / f"{name}.png"
    clip = {"x": 0, "y": 0, "width": size["width"], "height": TALLEST}
    await page.screenshot(path=path, full_page=whole, clip=clip if whole else None)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")
    await context.close()


async def ask(page: Page) -> None:
    """Send a prompt, wait for its answer and open its timeline."""
    await page.click("#prompt-send")
    await page.wait_for_selector('#answer[aria-busy="false"]', timeout=WAIT_MS)
    await page.click("#answer-figures a")
    await page.wait_for_selector(".waterfall", timeout=WAIT_MS)
    await page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")


if __name__ == "__main__":
    asyncio.run(main())
