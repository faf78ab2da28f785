"""The rows of the dashboard, top to bottom."""

from __future__ import annotations

from tools.dashboard.panel import Panel, quantiles, rate, told, told_rate

OK = ',outcome="ok"'
SPARE = ',state=~"free|cached"'
WITHIN = f"{rate('baton_requests_within_slo_total')} / {rate('baton_requests_total', labels=OK)}"

ROWS: dict[str, tuple[Panel, ...]] = {
    "SLOs and goodput": (
        Panel("Within the SLOs", {"": WITHIN}, "percentunit", kind="stat", width=4),
        Panel(
            "Goodput", {"": rate("baton_requests_within_slo_total")}, "reqps", kind="stat", width=4
        ),
        Panel("TTFT p99", {"": quantiles("baton_ttft_seconds")["p99"]}, "s", kind="stat", width=4),
        Panel("TPOT p99", {"": quantiles("baton_tpot_seconds")["p99"]}, "s", kind="stat", width=4),
        Panel(
            "Decode workers",
            {"": 'max(baton_workers{@,role="decode",state="live"})'},
            kind="stat",
            width=4,
        ),
        Panel(
            "Prefill workers",
            {"": 'max(baton_workers{@,role="prefill",state="live"})'},
            kind="stat",
            width=4,
        ),
        Panel(
            "Requests and goodput",
            {
                "all": rate("baton_requests_total"),
                "answered": rate("baton_requests_total", labels=OK),
                "within the SLOs": rate("baton_requests_within_slo_total"),
            },
            "reqps",
            "Capacity is what is answered within the SLOs of --slo-ttft-ms and --slo-tpot-ms.",
        ),
        Panel(
            "Tokens and goodput",
            {
                "all": rate("baton_output_tokens_total"),
                "within the SLOs": rate("baton_output_tokens_within_slo_total"),
            },
            "short",
            "Output tokens per second.",
        ),
        Panel(
            "SLOs missed",
            {
                "{{slo}}": rate("baton_slo_misses_total", "slo"),
                "SLO of {{slo}} (s)": "max by (slo) (baton_slo_seconds{@}) > 0",
            },
            "short",
            "Answers per second that missed one, and the SLOs themselves.",
        ),
    ),
    "Traffic": (
        Panel(
            "Requests by outcome",
            {"{{outcome}}": rate("baton_requests_total", "outcome")},
            "reqps",
            stacked=True,
        ),
        Panel("Requests being worked on", {"running": "sum(baton_requests_running{@})"}),
        Panel(
            "Turned away",
            {"{{reason}}": rate("baton_rejections_total", "reason")},
            "reqps",
            "429: the bound on work in progress (queue), or an SLO that would be missed.",
        ),
        Panel(
            "Tokens",
            {
                "prompt": rate("baton_prompt_tokens_total"),
                "of these cached": rate("baton_cached_prompt_tokens_total"),
                "output": rate("baton_output_tokens_total"),
            },
            what="Per second.",
        ),
        Panel(
            "Sequences in workers",
            {"{{state}}": told("baton_worker_sequences", "state")},
            stacked=True,
        ),
        Panel(
            "Prompt tokens to be computed",
            {"{{worker}}": told("baton_worker_waiting_tokens", "worker")},
            stacked=True,
        ),
    ),
    "Latency": (
        Panel("Time to first token", quantiles("baton_ttft_seconds"), "s", width=6),
        Panel(
            "Time per output token",
            quantiles("baton_tpot_seconds"),
            "s",
            "Mean of an answer, after its first token.",
            width=6,
        ),
        Panel(
            "Between two deliveries",
            quantiles("baton_itl_seconds"),
            "s",
            "Inter-token latency, as it left the conductor.",
            width=6,
        ),
        Panel("Whole request", quantiles("baton_e2e_seconds"), "s", width=6),
    ),
    "Engine": (
        Panel("Prompts wait for their turn", quantiles("baton_engine_queue_seconds"), "s"),
        Panel(
            "From turn to first token",
            quantiles("baton_engine_prefill_seconds"),
            "s",
            "What is fetched of a prefix included.",
        ),
        Panel(
            "Steps",
            {
                "p90 {{kind}}": quantiles("baton_engine_step_seconds", "kind")["p90 {{kind}}"],
            },
            "s",
        ),
        Panel(
            "Tokens computed",
            {"{{kind}} {{instance}}": rate("baton_engine_tokens_total", "kind", "instance")},
            what="Per second: of prompts, and by decoding.",
        ),
        Panel("Sequences of a step", quantiles("baton_engine_batch_sequences")),
        Panel(
            "Trouble",
            {
                "make way {{instance}}": rate("baton_engine_preemptions_total", "instance"),
                "failed steps {{instance}}": rate("baton_engine_failed_steps_total", "instance"),
            },
            what="Per second.",
        ),
    ),
    "KV and hits": (
        Panel("KV blocks", {"{{state}}": told("baton_worker_blocks", "state")}, stacked=True),
        Panel(
            "Blocks in use",
            {
                "{{worker}}": f"1 - {told('baton_worker_blocks', 'worker', labels=SPARE)} / "
                f"{told('baton_worker_blocks', 'worker')}"
            },
            "percentunit",
            most=1,
        ),
        Panel(
            "Prompt tokens by where their KV was",
            {
                "{{source}}": rate("baton_prefix_hit_tokens_total", "source"),
                "computed": rate("baton_engine_tokens_total", labels=',kind="prefill"'),
            },
            "short",
            "Own pool, another worker's (gpu), a store's memory (cpu) or disk (nvme), per second.",
            stacked=True,
        ),
        Panel(
            "Hit rate",
            {
                "prompt tokens": f"{rate('baton_cached_prompt_tokens_total')} / "
                f"{rate('baton_prompt_tokens_total')}"
            },
            "percentunit",
            most=1,
        ),
        Panel(
            "News of KV blocks",
            {
                "p99 {{instance}}": quantiles("baton_kv_event_lag_seconds", "instance")[
                    "p99 {{instance}}"
                ]
            },
            "s",
            "How old it is when a conductor has been sent it.",
        ),
        Panel(
            "Prefix map",
            {
                "blocks {{instance}}": "sum by (instance) (baton_prefix_map_blocks{@})",
                "gaps per second {{instance}}": rate("baton_kv_resyncs_total", "instance"),
            },
        ),
    ),
    "Handoff and fetches": (
        Panel("KV handed over", {"": rate("baton_handoff_bytes_total")}, "Bps", width=6),
        Panel(
            "Exposed transfer",
            quantiles("baton_handoff_exposed_seconds"),
            "s",
            "How long reading went on after prefill had ended: what overlap did not hide.",
            width=6,
        ),
        Panel("Handoffs, prefill included", quantiles("baton_handoff_seconds"), "s", width=6),
        Panel(
            "Handoffs by outcome",
            {
                "{{outcome}}": rate("baton_handoffs_total", "outcome"),
                "lease {{how}}": rate("baton_handoff_leases_ended_total", "how"),
                "loan {{how}}": rate("baton_loans_ended_total", "how"),
            },
            "ops",
            "As decode workers see them; how leases ended at prefill workers, and loans of blocks.",
            width=6,
        ),
        Panel(
            "KV fetched", {"{{tier}}": rate("baton_fetch_bytes_total", "tier")}, "Bps", stacked=True
        ),
        Panel(
            "Fetches",
            {"p90 {{tier}}": quantiles("baton_fetch_seconds", "tier")["p90 {{tier}}"]},
            "s",
        ),
        Panel(
            "Fetches that brought less",
            {"{{tier}}": rate("baton_fetch_failures_total", "tier")},
            "ops",
        ),
    ),
    "Store": (
        Panel(
            "Held",
            {
                "{{store}} {{tier}}": told("baton_store_bytes", "store", "tier"),
                "room of {{tier}}": told("baton_store_capacity_bytes", "tier"),
                "pinned": told("baton_store_pinned_bytes", "store"),
            },
            "bytes",
        ),
        Panel("Blocks found", {"{{tier}}": told_rate("baton_store_hits_total", "tier")}, "ops"),
        Panel("Blocks", {"{{tier}}": told("baton_store_blocks", "tier")}),
        Panel(
            "Puts by outcome",
            {"{{outcome}}": told_rate("baton_store_puts_total", "outcome")},
            "ops",
            stacked=True,
        ),
        Panel(
            "Evictions from memory",
            {"{{outcome}}": told_rate("baton_store_evictions_total", "outcome")},
            "ops",
            stacked=True,
        ),
        Panel(
            "Trouble",
            {
                "disk errors {{store}}": told_rate("baton_store_disk_errors_total", "store"),
                "damaged {{store}}": told_rate("baton_store_bad_blocks_total", "store"),
                "pins refused {{store}}": told_rate("baton_store_pins_refused_total", "store"),
                "down {{store}} {{tier}}": "1 - min by (store, tier) (baton_store_tier_up{@})",
                "offers {{outcome}}": told_rate("baton_worker_offers_total", "outcome"),
            },
            what="Per second; 1 for a tier that takes no blocks.",
        ),
    ),
    "Router and conductor": (
        Panel("Decisions take", quantiles("baton_route_seconds"), "s"),
        Panel(
            "Decisions by reason",
            {"{{reason}}": rate("baton_route_decisions_total", "reason")},
            "ops",
            stacked=True,
        ),
        Panel(
            "Actual by predicted TTFT", quantiles("baton_ttft_prediction_ratio"), what="1 is right."
        ),
        Panel(
            "Event loops are late",
            {
                "p99 {{instance}}": quantiles("baton_event_loop_lag_seconds", "instance")[
                    "p99 {{instance}}"
                ]
            },
            "s",
        ),
        Panel("CPU", {"{{instance}}": rate("process_cpu_seconds_total", "instance")}),
        Panel(
            "Memory",
            {
                "{{instance}}": "sum by (instance) (process_resident_memory_bytes{@})",
                "prefix map of {{instance}}": "sum by (instance) (baton_prefix_map_bytes{@})",
            },
            "bytes",
        ),
    ),
    "Keys and tenants": (
        Panel(
            "Tokens of tenants",
            {"{{tenant}} {{kind}}": rate("baton_tenant_tokens_total", "tenant", "kind")},
            what="Per second.",
            stacked=True,
        ),
        Panel(
            "Turned away by a tenant's limit",
            {"{{tenant}} {{reason}}": rate("baton_tenant_refusals_total", "tenant", "reason")},
            "reqps",
        ),
        Panel(
            "Keys and limits",
            {
                "no key that holds": rate("baton_unauthenticated_total"),
                "keys read: {{outcome}}": rate("baton_key_reloads_total", "outcome"),
                "limits without Redis": rate("baton_limit_fallbacks_total"),
            },
            "ops",
        ),
        Panel(
            "Certificates are good for",
            {
                "{{use}} {{instance}}": "min by (use, instance) "
                "(baton_certificate_not_after_timestamp_seconds{@}) - time()"
            },
            "s",
            "Between the processes (internal), and for clients (public).",
        ),
    ),
    "Failures": (
        Panel(
            "Members by state",
            {"{{role}} {{state}}": "max by (role, state) (baton_workers{@}) > 0"},
        ),
        Panel(
            "Further attempts by what ended the one before",
            {"{{reason}}": rate("baton_attempt_retries_total", "reason")},
            "ops",
            stacked=True,
        ),
        Panel(
            "Requests that moved",
            {
                "migrated, behind tokens that the client had": rate("baton_resumes_total"),
                "client came back: {{how}}": rate("baton_reconnects_total", "how"),
                "worker to {{role}}": rate("baton_role_changes_total", "role"),
            },
            "ops",
        ),
        Panel(
            "Given up",
            {
                "not tried again: {{reason}}": rate("baton_retry_refusals_total", "reason"),
                "poison": rate("baton_poison_requests_total"),
            },
            "ops",
        ),
        Panel(
            "Traces exported",
            {"{{outcome}}": rate("baton_trace_exports_total", "outcome")},
            "ops",
            stacked=True,
        ),
        Panel(
            "Versions",
            {"{{kind}} {{version}}": "count by (kind, version) (baton_process_info{@})"},
            stacked=True,
        ),
    ),
}
