"""The training text: the standard library of the Python that runs this script.

Every installation has it, so the model can be made again anywhere. Files are split between
training and held-out by a hash of their path; a chat example belongs to the side of its file.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

HELD_OUT_PERMILLE = 60
SKIPPED_DIRECTORIES = frozenset({"site-packages", "__pycache__", "ensurepip"})
# Generated tables: megabytes of character codes that teach a language model nothing.
SKIPPED_PREFIXES = ("encodings/cp", "encodings/iso8859", "encodings/mac", "encodings/koi8")
SKIPPED_FILES = frozenset({"html/entities.py", "pydoc_data/topics.py"})
MAX_TEST_FILE_BYTES = 200_000


class Pool(Enum):
    """Where a file comes from; training draws from each pool with its own weight."""

    LIBRARY = "library"
    TESTS = "tests"


@dataclass(frozen=True)
class SourceFile:
    """One source file, decoded."""

    path: str
    """Relative to the standard library, with forward slashes."""
    text: str
    pool: Pool
    held_out: bool


def standard_library() -> Path:
    """The directory of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_corpus(root: Path) -> list[SourceFile]:
    """Every usable source file under `root`, in an order that is the same everywhere."""
    files: list[SourceFile] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if _is_skipped(relative):
            continue
        text = _read_text(path)
        pool = Pool.TESTS if _is_test(relative) else Pool.LIBRARY
        too_long = pool is Pool.TESTS and len(text) > MAX_TEST_FILE_BYTES
        if text and not too_long:
            files.append(SourceFile(relative, text, pool, _is_held_out(relative)))
    return files


def _is_skipped(relative: str) -> bool:
    if relative in SKIPPED_FILES or relative.startswith(SKIPPED_PREFIXES):
        return True
    return any(part in SKIPPED_DIRECTORIES for part in relative.split("/"))


def _is_test(relative: str) -> bool:
    return any(part in {"test", "tests", "idle_test"} for part in relative.split("/")[:-1])


def _is_held_out(relative: str) -> bool:
    digest = hashlib.blake2b(relative.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 1000 < HELD_OUT_PERMILLE


def _read_text(path: Path) -> str:
    """The file's text, or "" where it is not UTF-8 (some test data is broken on purpose)."""
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n").expandtabs(4)
    except UnicodeDecodeError:
        return ""
