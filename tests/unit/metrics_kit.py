"""What every process exports, as Prometheus would read it, and the names that others rely on.

`python -m tests.unit.metrics_kit` renews the table of docs/metrics.md; read its diff.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from baton.kv.identity import Identity
from baton.rpc.tls import Pems
from baton.types.figures import OfferCounts, StoreFigures, TierFigures, TierState
from baton.types.fleet import BlockState, Role, WorkerLoad
from baton.types.kv_events import Tier
from baton.worker.member_metrics import MemberMetrics
from baton.worker.metrics import WorkerMetrics
from conductor.tenants.tenant import Amounts
from tests.fake_worker import fake_cluster, layout, say, worker_info
from tests.virtual_time import run_virtual

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs/metrics.md"
PROCESSES = ("conductor", "worker", "store")
BEGIN, END = "<!-- metrics -->\n", "<!-- /metrics -->\n"
OWN = "baton_"

STORE_LOAD = WorkerLoad(
    blocks=((BlockState.FREE, 8),),
    store=StoreFigures(
        tiers=tuple(TierFigures(tier, TierState.ON, 1, 8) for tier in (Tier.CPU, Tier.NVME))
    ),
)
WORKER_LOAD = WorkerLoad(
    1, 2, 300, tuple((state, 1) for state in BlockState), offers=OfferCounts(read=1)
)


class AnyCertificate:
    def current(self) -> Pems:
        return Pems(b"", b"", b"", ends_at=1.0)


@dataclass(frozen=True, slots=True)
class Family:
    name: str  # as PromQL says it: with `_total`
    kind: str  # counter, gauge or histogram
    labels: tuple[str, ...]
    help: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its samples."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))


def families_of(text: str) -> dict[str, Family]:
    """Of one process, by name."""
    found = {}
    for family in text_string_to_metric_families(text):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = Family(name, family.type, tuple(sorted(labels)), family.documentation)
    return found


@cache
def exported() -> Mapping[str, Mapping[str, Family]]:
    """What each kind of process exports, by process and name."""
    texts = {"conductor": run_virtual(_conductor()), "worker": worker_text(), "store": store_text()}
    return {process: families_of(text) for process, text in texts.items()}


async def _conductor() -> str:
    async with fake_cluster(say("ok")) as cluster:
        fleet = cluster.conductor.fleet
        await fleet.register(worker_info("store-0", Role.STORE, layout=layout()))
        await fleet.renew("store-0", "store-0-life-1", STORE_LOAD)
        await fleet.renew("prefill-0", "prefill-0-life-1", WORKER_LOAD)
        await asyncio.sleep(0)
        metrics = cluster.conductor.metrics
        metrics.note_decision("cache-aware", "cached")  # what has no series before it happens
        metrics.tenants.note_spent("t", Amounts(1, 2, 3))
        metrics.tenants.note_refusal("t", "requests")
        metrics.tenants.note_reload("ok")
        metrics.certificates.follow("public", AnyCertificate())
        return metrics.render().decode()


def worker_text() -> str:
    metrics = WorkerMetrics()
    metrics.certificates.follow("internal", AnyCertificate())
    metrics.follow(Identity("w", "life", layout()), Role.PREFILL, lambda: WORKER_LOAD)
    return metrics.own.render().decode()


def store_text() -> str:
    metrics = MemberMetrics("store")
    metrics.certificates.follow("internal", AnyCertificate())
    metrics.follow(Identity("s", "life", layout()), Role.STORE, lambda: STORE_LOAD)
    return metrics.own.render().decode()


def names_in(expression: str) -> set[str]:
    """The metrics of an expression in PromQL: words that are no function, keyword or label."""
    plain = re.sub(r'"[^"]*"', "", expression)
    plain = re.sub(r"\{[^}]*\}", "", plain)  # selectors of labels
    plain = re.sub(r"\[[^\]]*\]", "", plain)  # ranges
    plain = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", plain)
    words = re.findall(r"[A-Za-z_:][\w:]*(?!\s*\()\b", plain)
    keywords = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or"}
    return {word for word in words if word not in keywords | {"unless", "bool", "offset", "inf"}}


def table(found: Mapping[str, Mapping[str, Family]]) -> str:
    """For docs/metrics.md."""
    families = {name: family for each in found.values() for name, family in each.items()}
    rows = [
        f"| `{name}` | {families[name].kind} | {_labels(found, name)} | "
        f"{', '.join(_exporters(found, name))} | {families[name].help} |"
        for name in sorted(families, key=lambda name: (not name.startswith(OWN), name))
    ]
    head = "| name | type | labels | of | meaning |\n| --- | --- | --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n"


def _labels(found: Mapping[str, Mapping[str, Family]], name: str) -> str:
    labels = {label for each in found.values() if name in each for label in each[name].labels}
    return ", ".join(f"`{label}`" for label in sorted(labels))


def _exporters(found: Mapping[str, Mapping[str, Family]], name: str) -> Iterable[str]:
    return [process for process in PROCESSES if name in found[process]]


def documented() -> str:
    """The table that is in docs/metrics.md."""
    return DOC.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    text = DOC.read_text()
    before, _, rest = text.partition(BEGIN)
    DOC.write_text(before + BEGIN + table(exported()) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
