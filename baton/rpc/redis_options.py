"""How a process reaches the Redis of its cluster: address, password, TLS, and where its keys are.

Passwords come from the environment, a file or the URL. The file is read whenever a connection is
made, so a password that was changed there counts from the next connection on. `redis_calls.py` is
what connects; this is the plain value, for which no client library has to be there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from baton.errors import ConfigError

_SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True, slots=True)
class RedisOptions:
    """Raises ConfigError for what cannot work. No message of it, and no `repr`, has the password.

    `url` is `redis://host:port`, or `rediss://host:port` for TLS; a user and a password may be in
    it. `cert_file` and `key_file` are for a Redis that wants to see a certificate. Without
    `ca_file`, the certificate of Redis is checked against the system's authorities.
    """

    url: str = field(repr=False)
    cluster: str = "default"
    prefix: str = "baton"
    username: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def __post_init__(self) -> None:
        scheme = self.url.partition("://")[0]
        if scheme not in _SCHEMES:
            raise ConfigError("--redis must be redis://host:port or rediss://host:port (TLS)")
        if scheme != "rediss" and (self.ca_file or self.cert_file or self.key_file):
            raise ConfigError(
                "--redis-ca-file, --redis-cert-file and --redis-key-file are for TLS: "
                "write --redis rediss://host:port"
            )
        if bool(self.cert_file) != bool(self.key_file):
            raise ConfigError("--redis-cert-file and --redis-key-file belong together")
        if self.password and self.password_file:
            raise ConfigError("BATON_REDIS_PASSWORD and --redis-password-file: give one of them")
        for path in (self.password_file, self.ca_file, self.cert_file, self.key_file):
            _check_readable(path)

    @property
    def keys(self) -> str:
        """What all keys of the cluster begin with, before a colon. The braces are a hash tag: all
        lie on one node of Redis Cluster."""
        return f"{self.prefix}:{{{self.cluster}}}"


def _check_readable(path: str) -> None:
    if not path:
        return
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
