"""What a panel is, and the expressions that many of them have. `@` is the dashboard's selector."""

from __future__ import annotations

from dataclasses import dataclass

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries`: legend -> expression."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    what: str = ""
    kind: str = "timeseries"  # or stat
    stacked: bool = False
    width: int = 8
    most: float | None = None  # of the axis


def rate(name: str, *by: str, labels: str = "") -> str:
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} (rate({name}{{@{labels}}}[$__rate_interval]))"


def quantiles(name: str, *by: str) -> dict[str, str]:
    """Of a histogram; `by` also tells its parts apart."""
    legend = "".join(f" {{{{{label}}}}}" for label in by)
    labels = ", ".join(("le", *by))
    buckets = f"sum by ({labels}) (rate({name}_bucket{{@}}[$__rate_interval]))"
    return {f"{p}{legend}": f"histogram_quantile({q}, {buckets})" for p, q in QUANTILES.items()}


def told(name: str, *by: str, labels: str = "") -> str:
    """A gauge that members and conductors tell: the largest that anybody says, then added up."""
    return _largest(name, by, f"{name}{{@{labels}}}")


def told_rate(name: str, *by: str) -> str:
    """A counter of that kind."""
    return _largest(name, by, f"rate({name}{{@}}[$__rate_interval])")


def _largest(name: str, by: tuple[str, ...], vector: str) -> str:
    told_of = ("worker", "state", "outcome") if "_worker_" in name else ("store", "tier", "outcome")
    return f"sum by ({', '.join(by)}) (max by ({', '.join(told_of)}) ({vector}))"
