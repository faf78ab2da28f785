"""The generated parts of the documentation, and its links.

python -m tools.docs            write what is generated
python -m tools.docs --check    exit 1 and name what is stale, and links that lead to nothing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from tools.docs import config_reference, grpc_reference, http_reference
from tools.docs.blocks import Blocks, fill
from tools.docs.links import broken_links

ROOT = Path(__file__).resolve().parents[2]
PAGES: Mapping[str, Blocks] = {
    "docs/configuration.md": config_reference.BLOCKS,
    "docs/reference/grpc.md": grpc_reference.BLOCKS,
    "docs/reference/http.md": http_reference.BLOCKS,
}


def stale_pages(root: Path = ROOT) -> list[str]:
    texts = {name: (root / name).read_text("utf-8") for name in PAGES}
    return [name for name, text in texts.items() if fill(text, PAGES[name]) != text]


def write(root: Path = ROOT) -> None:
    for name, blocks in PAGES.items():
        page = root / name
        page.write_text(fill(page.read_text("utf-8"), blocks), "utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate the references in docs/.")
    parser.add_argument("--check", action="store_true", help="only tell what is stale or broken")
    if not parser.parse_args(argv).check:
        write()
        return 0
    complaints = [f"{name} is stale: run `make docs-reference`" for name in stale_pages()]
    complaints += broken_links(ROOT)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
