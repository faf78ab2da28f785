"""`python -m tests.unit.deploy.golden` renews the golden files; read their diff."""

from __future__ import annotations

import re
from pathlib import Path

from tests.unit.deploy.chart_kit import VALUE_SETS, render_files

FOLDER = Path(__file__).with_name("golden")
NAMES = ("default", "one-node")


def golden_text(name: str) -> str:
    """All files of a value set as one, without what is random."""
    files = render_files(VALUE_SETS[name])
    text = "".join(f"# {file}\n{text.strip()}\n\n" for file, text in files.items())
    return re.sub(r'^(  (?:token|password): ").*"', r'\1random"', text, flags=re.MULTILINE)


def main() -> None:
    for name in NAMES:
        (FOLDER / f"{name}.yaml").write_text(golden_text(name))


if __name__ == "__main__":
    main()
