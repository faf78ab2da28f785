"""What the chart gives to Prometheus and Grafana is that of deploy/, and leads to every process."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.unit.deploy.chart_kit import (
    CHART,
    ROOT,
    VALUE_SETS,
    Object,
    environment,
    expand,
    named,
    of_kind,
    pods,
    render,
    selects,
)

WATCHED = VALUE_SETS["watched"]
MEMBERS = {"prefill", "decode", "kvstore"}


def chosen(labels: Any, selector: Object) -> bool:
    """By labels and expressions, of which only `In` is used."""
    return selects(labels, selector["matchLabels"]) and all(
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", [])
    )


def metrics_ports() -> dict[str, int]:
    """Of the pods that have one."""
    found = {}
    for pod in pods(render(WATCHED)):
        ports = {each["name"]: each["containerPort"] for each in pod.container.get("ports", [])}
        if "metrics" in ports:
            found[pod.component] = ports["metrics"]
    return found


def test_the_pod_monitor_watches_every_worker_and_store() -> None:
    objects = render(WATCHED)
    (monitor,) = of_kind(objects, "PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "p"
    found = {p.component for p in pods(objects) if chosen(p.labels, monitor["spec"]["selector"])}
    assert found == MEMBERS == metrics_ports().keys()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")


def test_processes_serve_where_they_are_watched() -> None:
    for pod in pods(render(WATCHED)):
        if pod.component in MEMBERS:
            flags = [expand(flag, environment(pod.container)) for flag in pod.container["args"]]
            assert f"--metrics-port={metrics_ports()[pod.component]}" in flags


def test_prometheus_may_connect() -> None:
    objects = render(WATCHED)
    policy = named(objects, "NetworkPolicy", "baton-metrics")["spec"]
    found = {pod.component for pod in pods(objects) if chosen(pod.labels, policy["podSelector"])}
    assert found == MEMBERS
    assert policy["ingress"] == [
        {"ports": [{"port": "metrics"}], "from": [{"namespaceSelector": {}}]}
    ]


def test_nothing_is_watched_without_a_port() -> None:
    objects = render(VALUE_SETS["unwatched"])
    assert not of_kind(objects, "PodMonitor")
    assert of_kind(objects, "ServiceMonitor")  # conductors have a port anyway
    assert "baton-metrics" not in {each["metadata"]["name"] for each in objects}
    assert "metrics-port" not in json.dumps(objects)


def test_the_rules_are_those_of_the_file_with_the_runbook_s_address() -> None:
    (rule,) = of_kind(render(WATCHED), "PrometheusRule")
    assert rule["metadata"]["labels"]["release"] == "p"
    text = (ROOT / "deploy/prometheus/alerts.yaml").read_text()
    runbook = WATCHED["prometheusRule"]["runbookUrl"]
    assert rule["spec"] == yaml.safe_load(text.replace("docs/operations.md#", f"{runbook}#"))


def test_the_dashboard_is_that_of_the_file() -> None:
    config = named(render(WATCHED), "ConfigMap", "baton-dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config["metadata"]["annotations"] == {"grafana_folder": "baton"}
    (text,) = config["data"].values()
    assert json.loads(text) == json.loads((ROOT / "deploy/grafana/baton.json").read_text())


@pytest.mark.parametrize(
    ("link", "file"),
    [
        ("deploy/prometheus/alerts.yaml", "alerts.yaml"),
        ("deploy/grafana/baton.json", "dashboard.json"),
    ],
)
def test_there_is_one_copy_of_each(link: str, file: str) -> None:
    """In the chart, because Helm packages nothing from outside of it."""
    assert (ROOT / link).resolve() == (CHART / "files" / file).resolve()
