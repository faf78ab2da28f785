"""Alerts and the dashboard ask for what processes really export, and every alert has a runbook."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton import errors
from conductor.metrics import OTHER
from conductor.service import Policy
from tests.fake_worker import fake_cluster, say
from tests.unit.metrics_kit import ROOT, exported, names_in
from tests.virtual_time import virtual_time
from tools.dashboard.__main__ import render

LEASE_S = 9.0
RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((ROOT / "deploy/grafana/baton.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
WITH_PROMTOOL = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool comes with Prometheus"
)
EACH_ALERT = pytest.mark.parametrize("alert", ALERTS, ids=[rule["alert"] for rule in ALERTS])
EACH_PANEL = pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])


def series() -> set[str]:
    return {
        name
        for families in exported().values()
        for family in families.values()
        for name in family.series
    }


def labels_of(name: str) -> set[str]:
    """That processes give to the series; Prometheus adds where it scraped it."""
    added = {"cluster", "namespace", "instance", "le"}
    return added | {
        label
        for families in exported().values()
        for family in families.values()
        if name in family.series
        for label in family.labels
    }


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """Each metric with the labels that are asked of it."""
    found = re.findall(r"(\w+)\{([^}]*)\}", expression)
    return [(name, set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", inside))) for name, inside in found]


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (le, role) (rate(a_total{x="b_total"}[5m])) / c > 0.5', {"a_total", "c"}),
        ('absent(a) or max_over_time(b{c=~"d"}[1h]) unless on (e) f', {"a", "b", "f"}),
        ("1 - a", {"a"}),
    ],
)
def test_names_are_found(expression: str, names: set[str]) -> None:
    assert names_in(expression) == names


@EACH_ALERT
def test_alerts_watch_what_is_exported(alert: dict[str, Any]) -> None:
    assert names_in(alert["expr"])
    assert names_in(alert["expr"]) <= series()
    for name, labels in selectors(alert["expr"]):
        assert labels <= labels_of(name)


@EACH_PANEL
def test_panels_show_what_is_exported(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        assert names_in(target["expr"])
        assert names_in(target["expr"]) <= series()
        asked = {label for _, labels in selectors(target["expr"]) for label in labels}
        assert {"cluster", "namespace"} <= asked
        for name, labels in selectors(target["expr"]):
            assert labels <= labels_of(name)
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert shown <= set().union(*(labels_of(name) for name in names_in(target["expr"])))


def test_every_metric_of_ours_has_a_panel() -> None:
    shown = {
        name for panel in PANELS for target in panel["targets"] for name in names_in(target["expr"])
    }
    families = {name: family for each in exported().values() for name, family in each.items()}
    ours = {name for name in families if name.startswith("baton_")}
    unseen = {name for name in ours if not shown & set(families[name].series)}
    assert not unseen, (
        f"give {sorted(unseen)} a panel in tools/dashboard/rows.py, then run "
        "`python -m tools.dashboard`"
    )


@EACH_ALERT
def test_alerts_say_what_they_mean_and_have_a_section(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    notes = alert["annotations"]
    assert notes["summary"].endswith(".")
    assert notes["description"].endswith(".")
    page, _, anchor = notes["runbook_url"].partition("#")
    assert anchor == alert["alert"].lower()
    text = (ROOT / page).read_text()
    section = text.partition(f"\n### {alert['alert']}\n")[2].partition("\n##")[0]
    for word in ("**Means**", "**Confirm**", "**Do**"):
        assert word in section, f"{page} lacks {word} of {alert['alert']}"


def test_every_section_is_of_an_alert() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"\n### (Baton\w+)\n", page)) == {rule["alert"] for rule in ALERTS}


def test_names_of_alerts_are_unique() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)


def test_errors_that_alerts_name_exist() -> None:
    known = {
        cls.code for cls in vars(errors).values() if isinstance(cls, type) and hasattr(cls, "code")
    }
    (alert,) = [rule for rule in ALERTS if rule["alert"] == "BatonErrors"]
    (codes,) = re.findall(r'outcome=~"([^"]*)"', alert["expr"])
    assert set(codes.split("|")) <= known | {OTHER}


@WITH_PROMTOOL
def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", str(ROOT / "deploy/prometheus/alerts_test.yaml"))


@WITH_PROMTOOL
def test_every_expression_can_be_parsed(tmp_path: Path) -> None:
    expressions = [target["expr"] for panel in PANELS for target in panel["targets"]]
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(expressions)
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(file), str(ROOT / "deploy/prometheus/alerts.yaml"))


def promtool(*argv: str) -> None:
    done = subprocess.run(
        ["promtool", *argv], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_up_to_date() -> None:
    shown = (ROOT / "deploy/grafana/baton.json").read_text()
    assert shown == render(), "`python -m tools.dashboard` writes it anew from its rows.py"


def test_panels_have_places_and_numbers_of_their_own() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    for one, other in combinations((panel["gridPos"] for panel in DASHBOARD["panels"]), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


def test_the_dashboard_has_its_variables() -> None:
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "cluster", "namespace"]
    assert DASHBOARD["uid"] == "baton-overview"


def fires(alert: dict[str, Any], text: str) -> bool:
    """An alert that compares the largest value of one gauge with a number, on one scrape."""
    pattern = (
        r"max by \([^)]*\) \((?:max_over_time\()?(\w+)\{([^}]*)\}(?:\[\w+\]\))?\) (>|==) (\d+)"
    )
    name, wanted, sign, limit = re.fullmatch(pattern, alert["expr"]).groups()  # type: ignore[union-attr]
    labels = dict(re.findall(r'(\w+)="(\w+)"', wanted))
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    values: dict[str, float] = {}  # by role
    for line in lines:
        found = dict(re.findall(r'(\w+)="([^"]*)"', line))
        if labels.items() <= found.items():
            role = found["role"]
            values[role] = max(values.get(role, 0.0), float(line.rpartition(" ")[2]))
    assert values
    return any(
        value > int(limit) if sign == ">" else value == int(limit) for value in values.values()
    )


@virtual_time
async def test_a_killed_worker_makes_its_alerts_fire() -> None:
    rules = {rule["alert"]: rule for rule in ALERTS}
    watched = [rules["BatonWorkerDied"], rules["BatonNoDecodeWorker"]]
    async with fake_cluster(say("ok"), policy=Policy(lease_ttl_s=LEASE_S)) as cluster:
        metrics = cluster.conductor.metrics
        assert not any(fires(rule, metrics.render().decode()) for rule in watched)
        cluster.network.kill(cluster.workers["decode-0"].info.address)
        await asyncio.sleep(1.5 * LEASE_S)
        assert all(fires(rule, metrics.render().decode()) for rule in watched)
