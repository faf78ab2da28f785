"""How a tenant stands, as headers: OpenAI's names, and the same for both kinds of tokens."""

from __future__ import annotations

from collections.abc import Iterator

from conductor.tenants.limits import Standing
from conductor.tenants.tenant import Kind

PREFIX = "x-ratelimit"


def limit_headers(standing: Standing | None, now: float) -> dict[str, str]:
    """`now` is the loop's time. `-tokens` is of that kind of tokens of which less is left."""
    if standing is None:
        return {}
    headers: dict[str, str] = {}
    for kind in Kind:
        headers.update(_of(standing, kind, kind.label, now))
    tokens = [k for k in (Kind.INPUT, Kind.OUTPUT) if standing.capacities[k] is not None]
    if tokens:
        scarce = min(tokens, key=lambda kind: _left(standing, kind) / _capacity(standing, kind))
        headers.update(_of(standing, scarce, "tokens", now))
    return headers


def _of(standing: Standing, kind: Kind, label: str, now: float) -> Iterator[tuple[str, str]]:
    if standing.capacities[kind] is None:
        return
    reset_s = max(0.0, standing.full_s[kind] - (now - standing.at_s))
    yield f"{PREFIX}-limit-{label}", str(_capacity(standing, kind))
    yield f"{PREFIX}-remaining-{label}", str(_left(standing, kind))
    yield f"{PREFIX}-reset-{label}", f"{reset_s:.3f}s"


def _capacity(standing: Standing, kind: Kind) -> int:
    return standing.capacities[kind] or 0


def _left(standing: Standing, kind: Kind) -> int:
    return max(0, _capacity(standing, kind) - standing.used[kind])
