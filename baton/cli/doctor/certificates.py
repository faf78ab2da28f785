"""The certificates that the variables of the processes name, checked as the processes do."""

from __future__ import annotations

import time
from collections.abc import Mapping

from baton.errors import ConfigError
from baton.rpc.tls import PEER_NAME, Certificates, FrontCertificate, TlsConfig


def seconds_left(environ: Mapping[str, str]) -> dict[str, float]:
    """Until they end, by path; 0: clients refuse it. Raises ConfigError for what cannot be used."""
    left = {}
    if cert := environ.get("BATON_TLS_CERT"):
        name = environ.get("BATON_TLS_PEER_NAME", PEER_NAME)
        key, ca = (_beside(environ, each, "BATON_TLS_CERT") for each in ("TLS_KEY", "TLS_CA"))
        pems = Certificates(TlsConfig(cert, key, ca, name)).current()
        left[cert] = max(0.0, pems.ends_at - time.time())
    if cert := environ.get("BATON_SSL_CERTFILE"):
        key = _beside(environ, "SSL_KEYFILE", "BATON_SSL_CERTFILE")
        pems = FrontCertificate(cert, key).current()
        left[cert] = max(0.0, pems.ends_at - time.time())
    return left


def _beside(environ: Mapping[str, str], name: str, given: str) -> str:
    try:
        return environ[f"BATON_{name}"]
    except KeyError:
        raise ConfigError(f"{given} is set, and BATON_{name} is not") from None
