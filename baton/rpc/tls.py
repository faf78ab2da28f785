"""Certificates of a process: read from files, checked, and read again when the files change.

    certificates = Certificates(TlsConfig("tls.crt", "tls.key", "ca.crt"))   # ConfigError
    certificates.current()    # PEM texts; new ones once new files are complete and good

Both sides of an internal connection show a certificate of the cluster's authority, for one name
that all processes share: they are dialled by addresses that no certificate could list beforehand.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.errors import ConfigError
from baton.rpc.followed_files import FollowedFiles

PEER_NAME = "baton"
SOON_S = 3 * 24 * 3600.0  # a certificate that ends within this time is worth a warning
FOR_SCRAPERS = ("mutual", "server", "off")  # see `shown_to_scrapers`

log = logging.getLogger("baton.rpc.tls")


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Files (PEM). `cert` may have intermediate authorities behind the certificate; `ca` has those
    that peers are checked against, several while they are exchanged. `peer_name` is the DNS name
    that every certificate must have."""

    cert: str
    key: str
    ca: str
    peer_name: str = PEER_NAME

    @property
    def files(self) -> tuple[Path, Path, Path]:
        return Path(self.cert), Path(self.key), Path(self.ca)


@dataclass(frozen=True, slots=True)
class Pems:
    """What is shown (`cert`, `key`) and trusted (`ca`). `ends_at` is in Unix seconds; 0: clients
    refuse it already."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes
    ends_at: float


class Certificates:
    """What this process shows to the others of its cluster, and trusts, now. Safe to use from any
    thread: gRPC asks from its own.

    Raises ConfigError when the files cannot be used at the start; see FollowedFiles.
    """

    def __init__(self, config: TlsConfig) -> None:
        self.config = config
        self._files = FollowedFiles(config.files, lambda: _load(config))

    def current(self) -> Pems:
        """The same object until there is something new."""
        return self._files.current()[0]

    @property
    def context(self) -> ssl.SSLContext:
        """For a server of Python, at each connection anew: it lets in who shows a certificate of an
        authority. Whether that is one of the cluster's, `is_peer` says."""
        return self._files.current()[1]

    def is_peer(self, shown: Mapping[str, Any]) -> bool:
        """Whether a certificate, as `ssl` tells of it, has the name of the cluster's processes: an
        authority may have issued others, for other purposes."""
        return ("DNS", self.config.peer_name) in shown.get("subjectAltName", ())


class FrontCertificate:
    """What a server shows to clients, of which it asks no certificate. Raises ConfigError.

    `context` is for servers of Python, and follows the files by itself.
    """

    def __init__(self, cert: str, key: str) -> None:
        self._files = FollowedFiles((Path(cert), Path(key)), lambda: _load_front(cert, key))
        self.context = _front_context(cert, key)
        self.context.sni_callback = self._choose  # called at every handshake, also without a name

    def current(self) -> Pems:
        """The same object until there is something new."""
        return self._files.current()[0]

    def _choose(self, handshake: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
        handshake.context = self._files.current()[1]


def shown_to_scrapers(
    how: str, certificates: Certificates | None
) -> Certificates | FrontCertificate | None:
    """What a port for metrics shows: with `mutual` it is for peers of the cluster, with `server`
    for everybody. None: no TLS. Raises ConfigError."""
    if certificates is None or how == "off":
        return None
    if how == "server":
        return FrontCertificate(certificates.config.cert, certificates.config.key)
    return certificates


def _load(config: TlsConfig) -> tuple[Pems, ssl.SSLContext]:
    """Also the context of a server. Raises ConfigError when the files are missing, do not belong
    together, or no peer would accept them."""
    cert, key, ca = map(_read, config.files)
    server = _mutual(config, ssl.PROTOCOL_TLS_SERVER)
    return Pems(cert, key, ca, _check(config, server)), server


def trusting_only(cert: str) -> ssl.SSLContext:
    """For a client that knows which certificate will be shown, by whatever name. Raises
    ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    _load_authorities(context, cert)
    return context


def _load_front(cert: str, key: str) -> tuple[Pems, ssl.SSLContext]:
    context, ends_at = _front_context(cert, key), 0.0
    try:
        ends_at = _shake_hands(context, trusting_only(cert), None)
        _warn_soon(cert, ends_at)
    except ssl.SSLError as error:
        log.warning("clients will refuse %s: %s", cert, _why(error))
    return Pems(_read(Path(cert)), _read(Path(key)), b"", ends_at), context


def _front_context(cert: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_pair(context, cert, key)
    return context


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _check(config: TlsConfig, server: ssl.SSLContext) -> float:
    """Shake hands with ourselves, as what calls and as what is called: whatever would make a peer
    refuse us shows here. Returns when the certificate ends."""
    try:
        ends_at = _shake_hands(server, _mutual(config, ssl.PROTOCOL_TLS_CLIENT), config.peer_name)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"peers would refuse {config.cert}: {_why(error)} (checked against {config.ca} and the "
            f"name {config.peer_name!r})"
        ) from None
    except ssl.SSLError as error:
        raise ConfigError(f"{config.cert} cannot be used: {_why(error)}") from None
    _warn_soon(config.cert, ends_at)
    return ends_at


def _warn_soon(cert: str, ends_at: float) -> None:
    left_s = ends_at - time.time()
    if left_s < SOON_S:
        log.warning("%s ends in %.1f hours", cert, left_s / 3600)


def _mutual(config: TlsConfig, side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    _load_pair(context, config.cert, config.key)
    _load_authorities(context, config.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise ConfigError(f"{path} has no certificate (PEM)") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    for path in (cert, key):
        _read(Path(path))  # the library's error does not say which of the two is missing
    try:
        # A key with a passphrase would be asked for on the terminal.
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key} is not the private key of {cert}") from None
        raise ConfigError(
            f"{cert} and {key} are not a certificate and its private key (PEM, no passphrase): "
            f"{_why(error)}"
        ) from None


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> float:
    """A handshake in memory. Returns when the server's certificate ends, in Unix seconds."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    called = server.wrap_bio(to_server, to_client, server_side=True)
    caller = client.wrap_bio(to_client, to_server, server_hostname=name)
    waiting = [caller, called]
    while waiting:
        for side in tuple(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    shown = caller.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def _why(error: ssl.SSLError) -> str:
    said = getattr(error, "verify_message", "") or error.reason or str(error)
    return str(said).lower().replace("_", " ")
