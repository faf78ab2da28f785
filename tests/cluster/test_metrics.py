"""What real processes export is what docs/metrics.md says, and shows what happened to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from bench.ports import free_port
from tests.cluster.by_hand import ByHand, Conductor, by_hand, until
from tests.unit.metrics_kit import PROCESSES, exported, families_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

HOST = "127.0.0.1"
SLOS = ("--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000")
TRACE = "0af7651916cd43dd8448eb211c80319c"


@dataclass(frozen=True, slots=True)
class Watched:
    cluster: ByHand
    conductor: Conductor
    ports: Mapping[str, int]  # of /metrics, by process

    def scrape(self, name: str, accept: str = "text/plain") -> str:
        where = self.conductor.http if name == "conductor" else f"{HOST}:{self.ports[name]}"
        url = f"http://{where}/metrics"
        return httpx.get(url, headers={"accept": accept}, timeout=30.0, trust_env=False).text

    def value(self, name: str, sample: str) -> float:
        """0 where it is not exported."""
        lines = (line.rpartition(" ") for line in self.scrape(name).splitlines())
        return next((float(value) for text, _, value in lines if text == sample), 0.0)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("metrics")
    ports = {name: free_port() for name in ("prefill", "decode", "store")}
    with by_hand(directory) as cluster:
        conductor = cluster.conductor("c", "--lease-ttl", "2", *SLOS)
        store_at = f"{HOST}:{free_port()}"
        store = ("--memory-mib", "16", "--memory-dir", str(directory), "--dtype", "float32")
        disk = ("--disk-dir", str(directory / "disk"), "--disk-gib", "0.05")
        disk += ("--disk-segment-mib", "8", "--listen", store_at)
        cluster._spawn("store", "kvstore", *store, *disk, "--metrics-port", str(ports["store"]))
        for role in ("prefill", "decode"):
            cluster.worker(role, role, "--store", store_at, "--metrics-port", str(ports[role]))
        until(lambda: conductor.sees_live("prefill", "decode"))
        yield Watched(cluster, conductor, ports)


def test_a_request_shows_everywhere(watched: Watched) -> None:
    body = {"model": "demo", "prompt": "def fibonacci(n):" * 40, "max_tokens": 8, "min_tokens": 8}
    url = f"http://{watched.conductor.http}/v1/completions"
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    for _ in range(2):
        httpx.post(
            url, json=body, headers=headers, timeout=100.0, trust_env=False
        ).raise_for_status()

    value = watched.value
    assert value("conductor", 'baton_requests_total{outcome="ok"}') == 2
    assert value("conductor", "baton_requests_within_slo_total") == 2
    assert value("conductor", "baton_output_tokens_within_slo_total") == 16
    assert value("conductor", "baton_route_seconds_count") == 2
    assert value("decode", 'baton_engine_tokens_total{kind="decode"}') >= 14
    assert value("prefill", 'baton_engine_step_seconds_count{kind="prefill"}') >= 1
    assert value("prefill", 'baton_prefix_hit_tokens_total{source="pool"}') > 0
    handed_over = value("decode", 'baton_handoffs_total{outcome="done"}')
    if handed_over:  # a prompt that is short enough may be prefilled where it decodes
        assert value("decode", "baton_handoff_exposed_seconds_count") == handed_over
        how = 'baton_handoff_leases_ended_total{how="released"}'
        assert value("prefill", how) == handed_over

    text = watched.scrape("conductor", "application/openmetrics-text")
    (ttft,) = [family for family in parse_openmetrics(text) if family.name == "baton_ttft_seconds"]
    examples = [sample.exemplar.labels for sample in ttft.samples if sample.exemplar]
    assert {"trace_id": TRACE} in examples


def test_what_is_exported_is_what_is_documented(watched: Watched) -> None:
    until(
        lambda: watched.value("store", 'baton_store_puts_total{outcome="stored",store="store"}') > 0
    )
    documented = exported()
    real = {
        "conductor": families_of(watched.scrape("conductor")),
        "worker": families_of(watched.scrape("prefill")),
        "store": families_of(watched.scrape("store")),
    }
    for process in PROCESSES:
        assert real[process].keys() == documented[process].keys()
        for name, family in real[process].items():
            if family.labels:  # else nothing of it has happened
                assert family == documented[process][name]
    assert families_of(watched.scrape("decode")).keys() == documented["worker"].keys()


def test_health(watched: Watched) -> None:
    for port in watched.ports.values():
        assert httpx.get(f"http://{HOST}:{port}/health", trust_env=False).json() == {"status": "ok"}


def test_a_killed_worker_shows_as_dead(watched: Watched) -> None:
    """The last one: it is not started again."""
    dead = 'baton_workers{role="decode",state="dead"}'
    live = 'baton_workers{role="decode",state="live"}'
    assert (watched.value("conductor", dead), watched.value("conductor", live)) == (0, 1)
    watched.cluster.kill("decode")
    until(lambda: watched.value("conductor", dead) == 1)
    assert watched.value("conductor", live) == 0
