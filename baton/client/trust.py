"""Which certificates of servers are trusted."""

from __future__ import annotations

import ssl

from baton.errors import ConfigError

CA_FLAG, CA_VARIABLE = "--ca-file", "BATON_CA_FILE"


def trusted(ca_file: str) -> ssl.SSLContext | None:
    """The authorities in that file (PEM); None, without one: the system's. Raises ConfigError."""
    if not ca_file:
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        why = "has no certificate (PEM)"
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    raise ConfigError(f"{CA_FLAG} ({CA_VARIABLE}): {ca_file} {why}")
