"""What mkdocs.yml cannot say: pages from outside docs/ are on the site, too, and links to sources
become their paths, because the site does not have the sources."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.docs.markdown import Link, replace_links

ROOT = Path(__file__).resolve().parents[2]
TOP = {"ARCHITECTURE.md": "architecture.md", "CONTRIBUTING.md": "contributing.md"}
TOP |= {"CHANGELOG.md": "changelog.md", "baton/demo/model/README.md": "demo-model.md"}


def on_files(files: Files, *, config: Any) -> Files:
    for source, page in TOP.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: Any, files: Files) -> str:
    origin = {page: source for source, page in TOP.items()}
    uri = page.file.src_uri
    source = origin.get(uri, f"docs/{uri}")
    return replace_links(markdown, lambda link: _on_site(link, source, uri))


def _on_site(link: Link, source: str, uri: str) -> str | None:
    """`source`: the page's path in the repository; `uri`: its path on the site."""
    if link.external or not link.path:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link.path))
    if target.startswith("docs/"):
        on_site = target.removeprefix("docs/")
    elif target == "README.md":
        on_site = "index.md"
    elif target in TOP:
        on_site = TOP[target]
    elif (ROOT / target).exists():
        return _path(link.text, target)
    else:
        return None  # mkdocs says that it is broken
    if (ROOT / "docs" / on_site).is_dir():
        return _path(link.text, f"docs/{on_site}")
    anchor = f"#{link.anchor}" if link.anchor else ""
    relative = posixpath.relpath(on_site, posixpath.dirname(uri) or ".")
    return f"{'!' if link.image else ''}[{link.text}]({relative}{anchor})"


def _path(text: str, target: str) -> str:
    return f"`{target}`" if target.endswith(text.strip("`")) else f"{text} (`{target}`)"
