"""Fixtures of the fuzz tests: see `campaign`."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.fuzz.campaign import MINUTES, Campaign, ErrorLog

SLACK_S = 300.0  # for starting, and for making a failing case small


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/fuzz/" in item.path.as_posix():
            item.add_marker("fuzz")
            item.add_marker(pytest.mark.timeout(60 * MINUTES + SLACK_S))


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Campaign:
    """The tests of a file share its minutes."""
    sharing = sum(item.path == request.path for item in request.session.items)
    return Campaign(request.node.nodeid.rpartition("/")[2], 60 * MINUTES / sharing)


@pytest.fixture
def errors() -> Iterator[ErrorLog]:
    found = ErrorLog()
    logging.getLogger().addHandler(found)
    yield found
    logging.getLogger().removeHandler(found)
