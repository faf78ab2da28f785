"""Options that every process of a cluster has: how it finds and trusts the others."""

from __future__ import annotations

from dataclasses import dataclass

from baton.config import option
from baton.errors import ConfigError
from baton.rpc.redis_options import RedisOptions
from baton.rpc.tls import PEER_NAME, Certificates, TlsConfig


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    redis: str = option("", "redis://host:port, or rediss:// for TLS: where conductors are found")
    cluster_name: str = option("default", "which of the clusters in that Redis this one is")
    redis_prefix: str = option("baton", "what the names of all keys in Redis begin with")
    redis_username: str = option("", "user of Redis (ACL); empty: its default user")
    redis_password: str = option(
        "", "password of Redis; set BATON_REDIS_PASSWORD, because others can see flags"
    )
    redis_password_file: str = option(
        "", "file with the password of Redis, read again at every connection"
    )
    redis_ca_file: str = option(
        "", "authorities (PEM) for the certificate of Redis; empty: the system's"
    )
    redis_cert_file: str = option("", "our certificate (PEM), where Redis wants to see one")
    redis_key_file: str = option("", "the private key (PEM) of --redis-cert-file")
    tls_cert: str = option(
        "",
        "our certificate (PEM): with it, the processes of the cluster speak TLS and show theirs",
    )
    tls_key: str = option("", "the private key (PEM) of --tls-cert")
    tls_ca: str = option("", "authorities (PEM) that the certificates of the others are checked by")
    tls_peer_name: str = option(PEER_NAME, "DNS name that all these certificates have")

    @property
    def redis_options(self) -> RedisOptions | None:
        """None without --redis. Raises ConfigError."""
        if not self.redis:
            return None
        return RedisOptions(
            url=self.redis,
            cluster=self.cluster_name,
            prefix=self.redis_prefix,
            username=self.redis_username,
            password=self.redis_password,
            password_file=self.redis_password_file,
            ca_file=self.redis_ca_file,
            cert_file=self.redis_cert_file,
            key_file=self.redis_key_file,
        )

    def open_certificates(self) -> Certificates | None:
        """Those of the process, to be opened once: they follow their files. None: no TLS. Raises
        ConfigError."""
        given = (self.tls_cert, self.tls_key, self.tls_ca)
        if not any(given):
            return None
        if not all(given):
            raise ConfigError("--tls-cert, --tls-key and --tls-ca belong together: give all three")
        return Certificates(TlsConfig(*given, self.tls_peer_name))
