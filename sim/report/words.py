"""A result in plain words: what was simulated, and whether its SLOs hold."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sim.report.scales import number, percent, seconds
from sim.report.view import View

ENOUGH = 0.9  # an SLO holds when so many of all requests meet it

_CLUSTER = re.compile(r"(?:(\d+)P\+)?(\d+)([DM])")


def fleet(view: View) -> str:
    """Such as: 16 nodes (8xA800) serve llama3-70b: 8 compute prompts, 8 generate answers."""
    spec = view.result.spec
    found = _CLUSTER.fullmatch(str(spec.get("cluster", "")))
    on = f"{spec['node']}, " if "node" in spec else ""
    model = spec.get("model", "a model")
    if found is None:
        return f"A cluster ({on}{spec.get('cluster', 'not described')}) serves {model}."
    prefill, rest = int(found[1] or 0), int(found[2])
    if found[3] == "M":
        return f"{_nodes(rest)} ({on}coupled) serve {model}: each computes prompts and generates."
    return (
        f"{_nodes(prefill + rest)} ({on}disaggregated) serve {model}: {prefill} compute prompts "
        f"(prefill), {rest} generate the answers (decode)."
    )


def _nodes(count: int) -> str:
    return f"{count:,} node{'s' * (count != 1)}"


def asked(view: View) -> str:
    records = view.result.records
    if not len(records):
        return "Nothing was asked."
    arrivals = records.column("at_s")
    span = float(arrivals.max() - arrivals.min())
    rate = f", {number(len(records) / span)} per second" if span else ""
    return (
        f"They were asked {len(records):,} requests in {duration(span)}{rate}; prompts have "
        f"{records.column('prompt_tokens').mean():,.0f} tokens on average."
    )


def duration(span_s: float) -> str:
    if span_s < 120:
        return f"{span_s:.0f} seconds"
    if span_s < 7200:
        return f"{span_s / 60:.0f} minutes"
    return f"{span_s / 3600:.1f} hours"


def verdicts(view: View) -> Iterator[tuple[bool, str]]:
    """Whether each SLO holds, and a sentence that says why."""
    totals = view.result.totals
    for name, share, bound_s, key, what in (
        ("TTFT", view.ttft_share, view.ttft_slo_s, "ttft_s", "began"),
        ("TBT", view.tbt_share, view.tbt_slo_s, "tbt_p90_s", "had nine in ten gaps"),
    ):
        holds = share >= ENOUGH
        p90 = (totals.get(key) or {}).get("p90")
        seen = f"; nine in ten answers {what} within {seconds(p90)}" if p90 is not None else ""
        yield (
            holds,
            f"{name} {'holds' if holds else 'does not hold'}: {share_text(share)} of all requests "
            f"met {seconds(bound_s)}{seen}.",
        )


def share_text(share: float) -> str:
    """Never 100 % when something is missing."""
    return percent(share) if share == 1 or share < 0.995 else f"{int(share * 1e4) / 100:.2f}%"


def headline(view: View) -> str:
    share = float(view.good.mean()) if len(view.good) else 0.0
    return (
        f"{share_text(share)} of all requests were answered within both SLOs, "
        f"{number(view.result.totals.get('goodput_per_s', 0.0))} per second."
    )
