"""Links of all Markdown files in the repository that lead to nothing. Other sites are not asked."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from tools.docs.markdown import Link, anchors, links


def broken_links(root: Path) -> list[str]:
    """One line for each: where it is, and what is wrong."""
    return [
        f"{page.relative_to(root)}:{link.line}: {complaint}"
        for page in _pages(root)
        for link in links(page.read_text("utf-8"))
        if not link.external and (complaint := _complaint(page, link, root))
    ]


def _pages(root: Path) -> list[Path]:
    """Those that git has or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    paths = [root / name for name in sorted(set(listed.stdout.splitlines()))]
    return [path for path in paths if path.is_file()]


def _complaint(page: Path, link: Link, root: Path) -> str | None:
    target = (page.parent / link.path).resolve() if link.path else page
    if not target.exists():
        return f"{link.target}: there is no such file"
    if not target.is_relative_to(root):
        return f"{link.target}: it is outside of the repository"
    if link.anchor and target.suffix == ".md" and link.anchor not in _anchors(target):
        return f"{link.target}: there is no such heading"
    return None


@cache
def _anchors(page: Path) -> frozenset[str]:
    return frozenset(anchors(page.read_text("utf-8")))
