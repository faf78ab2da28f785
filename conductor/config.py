"""Options of the conductor; see `baton.config` for where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from baton.config import option
from baton.errors import ConfigError
from baton.telemetry import LEVELS


@dataclass(frozen=True, slots=True)
class ConductorConfig:
    host: str = option("127.0.0.1", "address to serve HTTP on")
    port: int = option(8000, "port of HTTP; 0 = any free one")
    grpc_host: str = option("", "address to serve gRPC on; empty = the same as --host")
    grpc_port: int = option(50051, "port of gRPC; 0 = any free one")
    model: str = option("", "model directory or hub id; empty = the built-in demo model")
    model_name: str = option("", "served name; empty = the last part of --model")
    name: str = option("conductor-0", "name in logs and in the fleet")
    lease_ttl: float = option(10.0, "seconds after which a silent worker is dead")
    max_queue: int = option(1024, "answers being worked on at most; more get 429")
    default_deadline: float = option(600.0, "seconds that a request may take at most")
    max_body_bytes: int = option(16 << 20, "largest request body")
    api_key: tuple[str, ...] = option((), "keys that clients must send one of; none = open")
    cpus: str = option("", "CPUs of this process, as 0-3,8; empty: all that it may run on")
    log_level: str = option("info", "least severe log records to write", choices=LEVELS)
    drain_timeout: float = option(30.0, "seconds that running requests get at shutdown")
    announce: bool = option(False, "print one JSON line with the addresses on stdout")
    exit_with_parent: bool = option(False, "end when standard input ends")

    def __post_init__(self) -> None:
        for name in ("port", "grpc_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"--{name.replace('_', '-')} must be from 0 to 65535")
        for name in ("lease_ttl", "default_deadline", "max_queue", "max_body_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be greater than 0")
        if self.drain_timeout < 0:
            raise ConfigError("--drain-timeout must not be negative")
