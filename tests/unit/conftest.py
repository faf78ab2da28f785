"""Which native library a test runs with, where its module asks for one (`needs_native`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from baton.native import unavailable, variant
from baton.native.library import VARIABLE, VARIANTS, library, why_not

_NONE = pytest.param(
    "", marks=pytest.mark.skip(reason=f"no native operations: {unavailable()}"), id="none"
)
_USABLE = [each.name for each in VARIANTS if why_not(each) is None]


@pytest.fixture(params=_USABLE or [_NONE])
def native_variant(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of the library that the test uses: each that this machine can."""
    monkeypatch.setenv(VARIABLE, request.param)
    _forget()
    yield request.param
    _forget()


def _forget() -> None:
    variant.cache_clear()
    library.cache_clear()
