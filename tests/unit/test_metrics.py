"""Names, formats and labels of what processes export."""

from __future__ import annotations

import re

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from baton.telemetry import Metrics
from baton.worker.metrics import WorkerMetrics
from tests.unit.metrics_kit import (
    OWN,
    ROOT,
    documented,
    exported,
    families_of,
    table,
    worker_text,
)


def test_every_metric_is_documented_and_the_other_way_round() -> None:
    assert documented() == table(exported()), (
        "the table of docs/metrics.md is stale: `python -m tests.unit.metrics_kit` renews it (read "
        "its diff); a new metric belongs into the section Metrics of ARCHITECTURE.md, too"
    )


def test_the_architecture_names_all_of_them() -> None:
    section = (ROOT / "ARCHITECTURE.md").read_text().partition("\n## Metrics\n")[2]
    named = set(re.findall(r"`(baton_\w+)`", section.partition("\n## ")[0]))
    ours = {name for each in exported().values() for name in each if name.startswith(OWN)}
    assert named == ours, (
        "edit the list in the section Metrics of ARCHITECTURE.md: it lacks "
        f"{sorted(ours - named)} and names what nobody exports: {sorted(named - ours)}"
    )


def test_all_names_have_a_prefix_and_a_unit() -> None:
    for families in exported().values():
        for family in families.values():
            assert family.name.startswith(("baton_", "process_"))
            assert family.help.endswith("."), family.name
            if family.kind == "counter":
                assert family.name.endswith("_total")


def test_both_formats_have_the_same_metrics() -> None:
    metrics = WorkerMetrics()
    body, content_type = metrics.own.render_for("application/openmetrics-text")
    assert content_type.startswith("application/openmetrics-text")
    names = {f.name for f in parse_openmetrics(body.decode())}
    plain, content_type = metrics.own.render_for("")
    assert content_type.startswith("text/plain; version=0.0.4")
    assert names == {name.removesuffix("_total") for name in families_of(plain.decode())}


def test_a_snapshot_stays_as_it_was() -> None:
    own = Metrics()
    things = own.tally("baton_things", "Things.")
    seconds = own.histogram("baton_thing_seconds", "Their times.", (1.0,))
    before = own.snapshot()
    things.value += 1
    seconds.observe(0.5)
    text = before.encode("")[0].decode()
    assert "baton_things_total 0.0" in text
    assert 'baton_thing_seconds_bucket{le="1.0"} 0.0' in text
    assert "baton_things_total 1.0" in own.snapshot().encode("")[0].decode()


def test_a_worker_says_only_what_is_its_own() -> None:
    assert not [name for name in families_of(worker_text()) if "store" in name]


def test_labels_that_were_not_said_cannot_be_added() -> None:
    own = Metrics()
    tallies = own.tallies("baton_ends", "Ends.", "how", ("well", "badly"))
    tallies.add("well", 2)
    with pytest.raises(KeyError):
        tallies.add("otherwise")
    parts = own.distributions("baton_parts_seconds", "Parts.", (1.0, 2.0), "kind", ("a", "b"))
    parts["b"].observe(1.5)
    with pytest.raises(KeyError):
        parts["c"].observe(1.5)
    lines = own.render().decode().splitlines()
    assert 'baton_ends_total{how="well"} 2.0' in lines
    assert 'baton_ends_total{how="badly"} 0.0' in lines
    assert 'baton_parts_seconds_bucket{kind="b",le="1.0"} 0.0' in lines
    assert 'baton_parts_seconds_bucket{kind="b",le="2.0"} 1.0' in lines
    assert 'baton_parts_seconds_sum{kind="b"} 1.5' in lines
    assert 'baton_parts_seconds_count{kind="a"} 0.0' in lines
