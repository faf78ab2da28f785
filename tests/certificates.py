"""Certificates for tests: authorities that issue pairs of files, good and bad."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


@dataclass(frozen=True, slots=True)
class Pair:
    cert: Path
    key: Path


class Authority:
    """Issues certificates into `directory`. `ca` is what those who trust it load."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._name = name
        self._ca = trustme.CA(organization_name=name)
        self._numbers = itertools.count()
        self.ca = directory / f"{name}.crt"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def issue(self, *names: str, expired: bool = False, days: float | None = None) -> Pair:
        """A new pair in files of its own, good for `days`, or for years."""
        days = -1 if expired else days
        until = None if days is None else datetime.now(UTC) + timedelta(days=days)
        issued = self._ca.issue_cert(*names, not_after=until)
        number = next(self._numbers)
        pair = Pair(*(self._directory / f"{self._name}-{number}.{end}" for end in ("crt", "key")))
        pair.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        pair.key.write_bytes(issued.private_key_pem.bytes())
        return pair
