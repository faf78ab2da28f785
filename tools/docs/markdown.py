"""Links and headings of Markdown texts; what is in code is neither."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_LINK = re.compile(
    r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]"  # [text], which may hold a pair of brackets
    r"\(\s*<?([^()\s<>]+)>?(?:\s+\"[^\"]*\")?\s*\)"  # (target "title")
)
_HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*$")
_ANCHOR = re.compile(r"<a\s+(?:id|name)=\"([^\"]+)\"")


@dataclass(frozen=True, slots=True)
class Link:
    line: int
    text: str
    target: str
    image: bool

    @property
    def path(self) -> str:
        """Relative to the page; empty: the page itself."""
        return self.target.partition("#")[0]

    @property
    def anchor(self) -> str:
        return self.target.partition("#")[2]

    @property
    def external(self) -> bool:
        return re.match(r"[a-z][a-z0-9+.-]*:", self.target) is not None


def links(text: str) -> list[Link]:
    found: list[Link] = []
    for number, line, is_code in _lines(text):
        if not is_code:
            found += (_link(number, match) for match in _LINK.finditer(_without_code(line)))
    return found


def replace_links(text: str, replacement: Callable[[Link], str | None]) -> str:
    """`replacement` gives the Markdown to stand for a link, or None to leave it."""

    def replace(line: str, number: int) -> str:
        bare = _without_code(line)
        for match in reversed(list(_LINK.finditer(bare))):
            # The text may hold code, which is blank in `bare`: columns are the same.
            there = _LINK.match(line, match.start())
            new = replacement(_link(number, there or match))
            if new is not None:
                line = line[: match.start()] + new + line[match.end() :]
        return line

    return "\n".join(
        line if is_code else replace(line, number) for number, line, is_code in _lines(text)
    )


def anchors(text: str) -> set[str]:
    """What `#...` can point to, by GitHub's rules (mkdocs.yml has the same)."""
    found: set[str] = set()
    for _, line, is_code in _lines(text):
        if is_code:
            continue
        found.update(_ANCHOR.findall(line))
        heading = _HEADING.match(line)
        if heading:
            found.add(_unique(slug(heading[1]), found))
    return found


def slug(heading: str) -> str:
    words = _LINK.sub(r"\2", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def _unique(name: str, taken: set[str]) -> str:
    number = 0
    while (candidate := f"{name}-{number}" if number else name) in taken:
        number += 1
    return candidate


def _lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """(number, line, whether it belongs to a block of code)."""
    fence = ""
    for number, line in enumerate(text.split("\n"), 1):
        mark = _FENCE.match(line)
        if fence:
            yield number, line, True
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        else:
            fence = mark[1] if mark else ""
            yield number, line, bool(mark)


def _without_code(line: str) -> str:
    return _CODE.sub(lambda match: " " * len(match[0]), line)


def _link(line: int, match: re.Match[str]) -> Link:
    return Link(line, match[2], match[3], match[1] == "!")
