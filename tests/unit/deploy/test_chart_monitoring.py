"""What the chart gives to Prometheus and Grafana is that of deploy/, and leads to every process."""

from __future__ import annotations

import json
import re
from typing import Any

import helm_python
import pytest
import yaml

from tests.unit.deploy.chart_kit import (
    CHART,
    NAMESPACE,
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
from tests.unit.deploy.test_chart_flags import processes
from tests.unit.metrics_kit import exported, names_in

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
    assert "scheme" not in endpoint


def test_processes_serve_where_they_are_watched() -> None:
    for pod in pods(render(WATCHED)):
        if pod.component in MEMBERS:
            flags = [expand(flag, environment(pod.container)) for flag in pod.container["args"]]
            assert f"--metrics-port={metrics_ports()[pod.component]}" in flags


@pytest.mark.parametrize("how", ["mutual", "server", "off"])
def test_prometheus_shows_what_processes_with_certificates_ask_for(how: str) -> None:
    values = {**VALUE_SETS["tls"], "metrics": {"tls": how}}
    (monitor,) = of_kind(render(values), "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    secret = "members-tls"
    server = {"ca": {"secret": {"name": secret, "key": "ca.crt"}}, "serverName": "baton"}
    mine = {
        "cert": {"secret": {"name": secret, "key": "tls.crt"}},
        "keySecret": {"name": secret, "key": "tls.key"},
    }
    expected = {"mutual": ("https", server | mine), "server": ("https", server), "off": (None,) * 2}
    assert (endpoint.get("scheme"), endpoint.get("tlsConfig")) == expected[how]
    configs = [config for pod, config in processes(values) if pod.component in MEMBERS]
    assert len(configs) == len(MEMBERS)
    for config in configs:
        assert (config.metrics_tls, config.tls_peer_name) == (how, "baton")


def test_prometheus_asks_for_the_name_that_the_certificates_have() -> None:
    values = {**VALUE_SETS["tls-by-cert-manager"], "serviceMonitor": {"enabled": True}}
    (monitor,) = of_kind(render(values), "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["tlsConfig"]["serverName"] == "baton.internal"
    assert endpoint["tlsConfig"]["keySecret"]["name"] == "baton-internal-tls"


def test_prometheus_may_connect() -> None:
    objects = render(WATCHED)
    policy = named(objects, "NetworkPolicy", "baton-metrics")["spec"]
    found = {pod.component for pod in pods(objects) if chosen(pod.labels, policy["podSelector"])}
    assert found == MEMBERS
    assert policy["ingress"] == [
        {"ports": [{"port": "metrics"}], "from": [{"namespaceSelector": {}}]}
    ]


def test_keda_scales_by_what_is_exported() -> None:
    objects = render(VALUE_SETS["scaled"])
    deployments = {each["metadata"]["name"]: each for each in of_kind(objects, "Deployment")}
    scaled = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "ScaledObject")}
    assert scaled.keys() == {"baton-conductor", "baton-prefill", "baton-decode"}
    series = {name for families in exported().values() for name in families}
    for name, spec in scaled.items():
        assert spec["scaleTargetRef"] == {"name": name}
        assert "replicas" not in deployments[name]["spec"]  # helm would set them back
        (trigger,) = spec["triggers"]
        query = trigger["metadata"]["query"]
        assert names_in(query) <= series
        assert f'namespace="{NAMESPACE}"' in query
        (pods_of,) = re.findall(r'(?:pod|worker)=~"([^"]*)"', query)
        assert re.fullmatch(pods_of, f"{name}-7d9f-x2x")
    prefill = scaled["baton-prefill"]
    assert (prefill["minReplicaCount"], prefill["maxReplicaCount"]) == (1, 8)
    assert prefill["triggers"][0]["metadata"]["threshold"] == "4096"


def test_parts_without_bounds_are_not_scaled() -> None:
    objects = render({"keda": {"enabled": True, "decode": {"maxReplicas": 3}}})
    assert [each["metadata"]["name"] for each in of_kind(objects, "ScaledObject")] == [
        "baton-decode"
    ]
    prefill = named(objects, "Deployment", "baton-prefill")
    assert prefill["spec"]["replicas"] == 1


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"prefill": {"minReplicas": 3, "maxReplicas": 2}}, "minReplicas is more than maxReplicas"),
        ({"conductor": {"maxReplicas": 3}, "redis": False}, "needs Redis"),
        ({"decode": {"maxReplicas": 3}, "elastic": True}, "elastic workers change their pools"),
        ({"decode": {"maxReplicas": 3}, "port": 0}, "needs metrics.port"),
    ],
)
def test_what_keda_cannot_do_is_said(values: Any, why: str) -> None:
    keda = {"enabled": True, **{k: v for k, v in values.items() if isinstance(v, dict)}}
    alone = {"conductor": {"replicas": 1}, "redis": {"enabled": False}}
    given = {
        "keda": keda,
        "elastic": {"enabled": values.get("elastic", False)},
        "metrics": {"port": values.get("port", 9090)},
        **(alone if values.get("redis") is False else {}),
    }
    with pytest.raises(helm_python.HelmError, match=why):
        render(given)


def test_nothing_is_watched_without_a_port() -> None:
    objects = render(VALUE_SETS["unwatched"])
    assert not of_kind(objects, "PodMonitor")
    assert of_kind(objects, "ServiceMonitor")  # conductors have a port anyway
    assert "baton-metrics" not in {each["metadata"]["name"] for each in objects}
    assert "metrics-port" not in json.dumps(objects)


def test_the_rules_are_those_of_the_file_with_the_runbook_s_address_and_the_namespace() -> None:
    (rule,) = of_kind(render(WATCHED), "PrometheusRule")
    assert rule["metadata"]["labels"]["release"] == "p"
    text = (ROOT / "deploy/prometheus/alerts.yaml").read_text()
    runbook = WATCHED["prometheusRule"]["runbookUrl"]
    text = text.replace("docs/operations.md#", f"{runbook}#")
    absent = "absent(baton_requests_running)"  # of this release, whoever else is there
    assert text.count(absent) == 1
    ours = f'absent(baton_requests_running{{namespace="{NAMESPACE}"}})'
    assert rule["spec"] == yaml.safe_load(text.replace(absent, ours))


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
