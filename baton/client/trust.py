"""Which certificates of servers are trusted."""

from __future__ import annotations

import os
import ssl

from baton.errors import ConfigError


def trusted() -> ssl.SSLContext | None:
    """The authorities of BATON_CA_FILE; None: the system's. Raises ConfigError."""
    if not (path := os.environ.get("BATON_CA_FILE", "")):
        return None
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:  # also when it is no PEM
        why = error.strerror or error
        raise ConfigError(f"BATON_CA_FILE {path} cannot be used: {why}") from None
