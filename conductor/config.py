"""Options of the conductor; see `baton.config` for where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from baton.config import option
from baton.errors import ConfigError
from baton.logs import LEVELS
from baton.worker.cluster_options import ClusterOptions
from conductor.admission import Slos, TpotBy
from conductor.estimate import Fetch
from conductor.fleet import MAP_BLOCKS
from conductor.planner import PlannerOptions
from conductor.policies import RoutePolicy
from conductor.router import RouteOptions
from conductor.tenants.options import TenancyOptions

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class ConductorConfig(ClusterOptions):
    host: str = option("127.0.0.1", "address to serve HTTP on")
    port: int = option(8000, "port of HTTP; 0 = any free one")
    grpc_host: str = option("", "address to serve gRPC on; empty = the same as --host")
    grpc_port: int = option(50051, "port of gRPC; 0 = any free one")
    internal_port: int = option(
        0, "with --tls-cert or --ssl-certfile: port of the services for workers; 0 = any free one"
    )
    ssl_certfile: str = option("", "certificate (PEM) for HTTPS, and for the public gRPC")
    ssl_keyfile: str = option("", "the private key (PEM) of --ssl-certfile")
    model: str = option("", "model directory or hub id; empty = the built-in demo model")
    model_name: str = option("", "served name; empty = the last part of --model")
    name: str = option("conductor-0", "name in logs and in the fleet")
    advertise: str = option("", "host that workers reach this conductor by; empty: what it bound")
    lease_ttl: float = option(10.0, "seconds after which a silent worker is dead")
    max_queue: int = option(1024, "answers being worked on at most; more get 429")
    policy: str = option(
        RoutePolicy.CACHE_AWARE.value,
        "how workers are chosen",
        choices=tuple(policy.value for policy in RoutePolicy),
    )
    kv_fetch: bool = option(
        True, "let workers fetch what others and stores hold of a prefix; off: own caches only"
    )
    local_prefill_tokens: str = option(
        AUTO,
        "prompts with at most so many tokens to compute are prefilled by the decode worker itself; "
        "0 = none, auto = where that costs less time than a handoff",
    )
    prompt_patience: float = option(
        0.0,
        "with --policy cache-aware: seconds for which shorter prompts may overtake one, per second "
        "that it takes; 0 = prompts are computed in the order in which they come",
    )
    slo_ttft_ms: float = option(
        0.0, "turn requests away that would miss this time to the first token; 0 = off"
    )
    slo_tpot_ms: float = option(
        0.0, "turn requests away that would miss this time per output token; 0 = off"
    )
    slo_tpot_by: str = option(
        TpotBy.ASSIGNED.value,
        "which sequences of a worker count for that: all it was given, those that decode now, or "
        "those predicted to decode when the prompt is computed",
        choices=tuple(which.value for which in TpotBy),
    )
    elastic: bool = option(
        False, "move workers that can do both between prefill and decode, as the load wants"
    )
    elastic_settle: float = option(
        15.0, "with --elastic: seconds after such a change until its effect is judged"
    )
    advise: bool = option(
        False, "say in /cluster how many workers each pool should have, for who can add some"
    )
    prefix_map_blocks: int = option(MAP_BLOCKS, "KV blocks whose holders are remembered at most")
    default_deadline: float = option(600.0, "seconds that a request may take at most")
    sse_keepalive: float = option(
        5.0, "seconds of silence in a stream until a comment is sent; 0 = never"
    )
    max_prompt_tokens: int = option(0, "longest prompt, in tokens; 0 = what the context holds")
    max_output_tokens: int = option(0, "longest answer, in tokens; 0 = what the context holds")
    max_body_bytes: int = option(16 << 20, "largest request body")
    api_key: tuple[str, ...] = option((), "keys that clients must send one of; none = open")
    keys: str = option("", "file with the API keys of tenants, or `redis`: they are in --redis")
    tenants: str = option("", "YAML file with the tenants of --keys and their limits")
    limits_without_redis: str = option(
        "local",
        "while Redis is away: each conductor keeps its part of the limits, or nothing that has "
        "limits is let in",
        choices=("local", "refuse"),
    )
    private_status: bool = option(
        False, "metrics and the fleet only for the key of a tenant with `admin: true`"
    )
    cpus: str = option("", "CPUs of this process, as 0-3,8; empty: all that it may run on")
    log_level: str = option("info", "least severe log records to write", choices=LEVELS)
    drain_timeout: float = option(30.0, "seconds that running requests get at shutdown")
    otlp_endpoint: str = option(
        "",
        "OpenTelemetry collector to export traces to by OTLP over gRPC, as http://host:4317; "
        "empty = none",
    )
    trace_sample: float = option(
        1.0,
        "with --otlp-endpoint: share of requests whose trace is exported; a client that sends "
        "traceparent decides itself",
    )
    announce: bool = option(False, "print one JSON line with the addresses on stdout")
    exit_with_parent: bool = option(False, "end when standard input ends")

    def __post_init__(self) -> None:
        for name in ("port", "grpc_port", "internal_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"--{name.replace('_', '-')} must be from 0 to 65535")
        positive = (
            "lease_ttl",
            "default_deadline",
            "max_queue",
            "max_body_bytes",
            "elastic_settle",
        )
        for name in (*positive, "prefix_map_blocks"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be greater than 0")
        for name in (
            "drain_timeout",
            "sse_keepalive",
            "slo_ttft_ms",
            "slo_tpot_ms",
            "prompt_patience",
            "max_prompt_tokens",
            "max_output_tokens",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must not be negative")
        if not 0 <= self.trace_sample <= 1:
            raise ConfigError("--trace-sample must be from 0 to 1")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError("--otlp-endpoint must begin with http:// or https://")
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise ConfigError("--ssl-certfile and --ssl-keyfile belong together")
        if self.local_prefill_tokens != AUTO and not self.local_prefill_tokens.isdecimal():
            raise ConfigError("--local-prefill-tokens must be a number of tokens, or auto")

        _ = self.tenancy  # raises ConfigError for options that do not belong together

    @property
    def tenancy(self) -> TenancyOptions:
        return TenancyOptions(
            keys=self.keys,
            tenants=self.tenants,
            plain_keys=self.api_key,
            redis=self.redis_options,
            local_without_redis=self.limits_without_redis == "local",
        )

    @property
    def routing(self) -> RouteOptions:
        local = self.local_prefill_tokens
        tokens = None if local == AUTO else int(local)
        fetch = Fetch.CLUSTER if self.kv_fetch else Fetch.NOBODY
        return RouteOptions(RoutePolicy(self.policy), tokens, fetch, self.prompt_patience)

    @property
    def planner(self) -> PlannerOptions | None:
        if not self.elastic and not self.advise:
            return None
        return PlannerOptions.settling(self.elastic_settle, moves=self.elastic)

    @property
    def slos(self) -> Slos:
        ttft, tpot = self.slo_ttft_ms / 1e3, self.slo_tpot_ms / 1e3
        return Slos(ttft or None, tpot or None, TpotBy(self.slo_tpot_by))
