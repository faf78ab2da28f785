"""The documentation: generated parts are fresh, links lead somewhere, the site needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.docs import config_reference, grpc_reference, http_reference
from tools.docs.__main__ import main
from tools.docs.blocks import fill
from tools.docs.links import broken_links
from tools.docs.markdown import anchors, links, replace_links

ROOT = Path(__file__).resolve().parents[2]


def test_documents_are_fresh_and_their_links_lead_somewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_a_site_is_built_that_asks_nothing_of_the_network(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {"index.html", "configuration.html", "architecture.html", "grpc.html"} <= {
        p.name for p in pages
    }
    loaded = re.compile(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=\"?(?:https?:)?//")
    for page in pages:
        assert not loaded.search(page.read_text()), page.name


def test_generated_parts_are_replaced_and_prose_stays() -> None:
    page = "# A\n\n<!-- generated: t -->\nold\n<!-- end of t -->\n\nprose\n"
    fresh = fill(page, {"t": lambda: "new"})
    assert "old" not in fresh
    assert fresh.index("# A") < fresh.index("new") < fresh.index("prose")
    assert fill(fresh, {"t": lambda: "new"}) == fresh


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<!-- generated: t -->\n",
        "<!-- generated: other -->\n<!-- end of other -->\n",
        "<!-- generated: t -->\n<!-- generated: t -->\n<!-- end of t -->\n",
    ],
)
def test_a_page_without_its_blocks_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="block"):
        fill(page, {"t": lambda: "new"})


def test_options_are_told_with_variable_default_and_choices() -> None:
    conductor = config_reference.BLOCKS["conductor"]().splitlines()
    assert "| `--port` | `BATON_PORT` | `8000` | port of HTTP; 0 = any free one |" in conductor
    [policy] = [line for line in conductor if "`--policy`" in line]
    assert "`cache-aware` | how workers are chosen: `random`" in policy
    assert "--role" in config_reference.BLOCKS["elastic"]()
    assert "--listen" not in config_reference.BLOCKS["elastic"]()
    assert "| `--try` |" in config_reference.BLOCKS["serve"]()


def test_fields_of_http_are_told_with_types_and_ranges() -> None:
    bodies = http_reference.bodies().splitlines()
    assert "| `temperature` | number from 0 to 2 | 0 is greedy; left out: 1. |" in bodies
    assert any("| list of [Message](#message) | **Required.**" in line for line in bodies)
    assert any("| list of up to 128 integers from 0 to" in line for line in bodies)
    assert all(line.split("|")[3].strip() for line in bodies if line.startswith("| `"))
    replies = http_reference.replies()
    assert "| `choices[].message.content` | string |" in replies
    assert "| `choices[].token_ids` | list of integers | Only where it was asked for. |" in replies
    [chat] = [line for line in http_reference.endpoints().splitlines() if "/chat/" in line]
    assert "[ChatBody](#chatbody) | [ChatAnswer](#chatanswer) or `text/event-stream` |" in chat
    assert "| 429 |" in http_reference.errors()


def test_messages_of_grpc_are_told_with_the_comments_of_their_fields() -> None:
    public, internal = grpc_reference.public(), grpc_reference.internal()
    assert "| `Generate` | [GenerateRequest](#generaterequest) | stream of [Gen" in public
    assert "| 8 | `logit_bias` | map of uint32 to double | Added to" in public
    assert "| 2 | `text` | string, one of `prompt` |" in public
    assert "| 9 | `cache_pin_s` | optional double | Keep the prompt's KV" in public
    assert "### service Handoff\n\nServed by prefill workers" in internal
    assert "| 2 | `ROLE_DECODE` |" in internal


def test_who_comes_from_vllm_is_told_of_flags_that_there_are() -> None:
    text = (ROOT / "docs/migrate-from-vllm.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    told = {flag for row in rows for flag in re.findall(r"`(--[a-z-]+)", row[2])}
    known = set(re.findall(r"`(--[a-z-]+)`", config_reference.of_serve()))
    known |= {flag.replace("--", "--no-", 1) for flag in known}
    assert len(told) > 10
    assert told <= known


def test_links_in_code_are_none() -> None:
    text = "[a](b.md#c) `[x](y)` ![i](i.png)\n```\n[x](y)\n```\n[`code`](z)\n"
    assert [link.target for link in links(text)] == ["b.md#c", "i.png", "z"]
    assert next((link.path, link.anchor) for link in links(text)) == ("b.md", "c")
    assert replace_links(text, lambda link: link.text.upper()).splitlines() == [
        "A `[x](y)` I",
        "```",
        "[x](y)",
        "```",
        "`CODE`",
    ]


def test_headings_have_the_anchors_that_github_gives_them() -> None:
    text = '# What is `it`?\n## A — b\n```\n# none\n```\n## A — b\n<a id="here"></a>\n'
    assert anchors(text) == {"what-is-it", "a--b", "a--b-1", "here"}


def test_broken_links_are_told_with_their_lines(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "a.md").write_text("# A\n[1](b.md#b) [2](b.md#c)\n[3](gone.md) [4](#a) [5](#z)\n")
    (tmp_path / "b.md").write_text("# B\n[6](https://example.com/x) [7](../..)\n")
    assert broken_links(tmp_path) == [
        "a.md:2: b.md#c: there is no such heading",
        "a.md:3: gone.md: there is no such file",
        "a.md:3: #z: there is no such heading",
        "b.md:2: ../..: it is outside of the repository",
    ]
