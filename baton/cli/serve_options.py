"""The flags of `baton serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

_ENGINE = "Engine (default: chosen by the workers)"
_STORE = "Routing and KV cache"
_ACCESS = "Who may use it"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Engine flags that are None are left to the workers."""

    model: Annotated[
        str | None,
        typer.Argument(help="Directory or hub id; the built-in demo model when left out."),
    ] = None
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 1
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 1
    colocated: Annotated[
        bool, typer.Option("--colocated", help="Decode workers only; each also does prefill.")
    ] = False
    elastic: Annotated[
        bool,
        typer.Option("--elastic", help="Workers change between prefill and decode with the load."),
    ] = False
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP; 0 = any free port.")] = 8000
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC; 0 = any.")] = 50051
    conductors: Annotated[
        int, typer.Option(min=1, help="Conductors, on ports in a row from the given ones.")
    ] = 1
    redis: Annotated[
        str,
        typer.Option(
            envvar="BATON_REDIS",
            metavar="URL",
            help="Where conductors find each other's requests: when one dies, others go on.",
        ),
    ] = ""
    ssl_certfile: Annotated[
        str,
        typer.Option(
            envvar="BATON_SSL_CERTFILE", help="Certificate (PEM) for HTTPS and the public gRPC."
        ),
    ] = ""
    ssl_keyfile: Annotated[
        str, typer.Option(envvar="BATON_SSL_KEYFILE", help="Its private key (PEM).")
    ] = ""
    tls_cert: Annotated[
        str,
        typer.Option(
            envvar="BATON_TLS_CERT",
            help="Certificate (PEM) of all processes: they speak TLS with each other.",
        ),
    ] = ""
    tls_key: Annotated[str, typer.Option(envvar="BATON_TLS_KEY", help="Its private key (PEM).")] = (
        ""
    )
    tls_ca: Annotated[
        str, typer.Option(envvar="BATON_TLS_CA", help="The authorities (PEM) that they check.")
    ] = ""
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto"
    model_name: Annotated[
        str | None, typer.Option(help="Served name; the model's last part when left out.")
    ] = None
    transport: Annotated[str, typer.Option(help="auto, nixl, nccl or shm.")] = "auto"
    try_text: Annotated[
        str | None,
        typer.Option("--try", metavar="TEXT", help="Answer TEXT once ready, then keep serving."),
    ] = None
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds until ready.")] = 600.0
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get on Ctrl-C.")
    ] = 30.0
    metrics_port: Annotated[
        int,
        typer.Option(
            envvar="BATON_METRICS_PORT",
            min=0,
            max=65535,
            help="First of the ports in a row for /metrics of each worker and the store; 0 = none.",
        ),
    ] = 0
    metrics_tls: Annotated[
        str,
        typer.Option(
            envvar="BATON_METRICS_TLS",
            help="With --tls-cert, who may read them: mutual (a certificate), server or off.",
        ),
    ] = "mutual"
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="OpenTelemetry collector for traces: http://host:4317."),
    ] = None
    trace_sample: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --otlp-endpoint: share of requests to trace."),
    ] = None
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every process's log.")] = False
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object per line on standard output.")
    ] = False
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of a KV block.", rich_help_panel=_ENGINE)
    ] = None
    num_blocks: Annotated[
        int | None, typer.Option(help="KV blocks of a worker.", rich_help_panel=_ENGINE)
    ] = None
    kv_memory_mib: Annotated[
        int | None,
        typer.Option(
            help="KV memory of a worker, MiB; left out: from what is free.", rich_help_panel=_ENGINE
        ),
    ] = None
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences of one step.", rich_help_panel=_ENGINE)
    ] = None
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one step.", rich_help_panel=_ENGINE)
    ] = None
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt and answer, tokens.", rich_help_panel=_ENGINE)
    ] = None
    kernels: Annotated[
        str | None,
        typer.Option(
            help="What computes: auto, native, reference, triton, flash.", rich_help_panel=_ENGINE
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of a worker.", rich_help_panel=_ENGINE),
    ] = None
    prefill_cpus: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="CPUs that the prefill workers divide, as 0-3,8.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    decode_cpus: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="CPUs that the decode workers divide. Without either, all workers get a part.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    verify: Annotated[
        str | None,
        typer.Option(help="Digests of handed-over KV: off, sample, full.", rich_help_panel=_ENGINE),
    ] = None
    prefix_caching: Annotated[
        bool,
        typer.Option(help="Reuse the KV of common prefixes.", rich_help_panel=_STORE),
    ] = True
    policy: Annotated[
        str | None,
        typer.Option(
            help="Routing: cache-aware, consistent-hash, least-loaded, round-robin, random.",
            rich_help_panel=_STORE,
        ),
    ] = None
    kv_fetch: Annotated[
        bool,
        typer.Option(
            help="Let workers fetch what others and the store hold of a prefix.",
            rich_help_panel=_STORE,
        ),
    ] = True
    local_prefill_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Prompts up to this length skip the prefill worker; 0: none.",
            rich_help_panel=_STORE,
        ),
    ] = None
    prompt_patience: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds for which shorter prompts may overtake one, per second that it takes.",
            rich_help_panel=_STORE,
        ),
    ] = None
    slo_ttft_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Refuse what would miss this TTFT.", rich_help_panel=_STORE),
    ] = None
    slo_tpot_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Refuse what would miss this TPOT.", rich_help_panel=_STORE),
    ] = None
    elastic_settle: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="With --elastic: seconds between two changes.",
            rich_help_panel=_STORE,
        ),
    ] = None
    keys: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="API keys (`baton keys create TENANT --file FILE`), or `redis`.",
            rich_help_panel=_ACCESS,
        ),
    ] = None
    tenants: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="YAML: whose keys they are, and their limits.",
            rich_help_panel=_ACCESS,
        ),
    ] = None
    store_memory_mib: Annotated[
        int,
        typer.Option(min=0, help="KV store in shared memory; 0: no store.", rich_help_panel=_STORE),
    ] = 0
    store_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The store's NVMe tier.", rich_help_panel=_STORE),
    ] = None
    store_gib: Annotated[
        float | None,
        typer.Option(help="Space that the NVMe tier may take.", rich_help_panel=_STORE),
    ] = None

    @property
    def prefill_workers(self) -> int:
        return 0 if self.colocated else self.prefill

    @property
    def served_name(self) -> str:
        if self.model_name is not None:
            return self.model_name
        return "demo" if self.model is None else Path(self.model).resolve().name
