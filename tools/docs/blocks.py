"""The generated parts of pages that are otherwise written by hand.

<!-- generated: NAME -->
...
<!-- end of NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Blocks = Mapping[str, Callable[[], str]]

_BEGIN = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)


def fill(page: str, blocks: Blocks) -> str:
    """`page` with fresh blocks. Raises ValueError unless it has each of them once."""
    there = _BEGIN.findall(page)
    if sorted(there) != sorted(blocks):
        raise ValueError(f"the page has the blocks {there}, not {list(blocks)}")
    for name, make in blocks.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        old, found, after = rest.partition(end)
        if not found or _BEGIN.search(old):
            raise ValueError(f"the block {name} does not end")
        page = f"{before}{begin}\n\n{make().strip()}\n\n{end}{after}"
    return page
