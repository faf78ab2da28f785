"""Certificates, keys and passwords reach the processes that need them, and no others."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest

from tests.unit.deploy.chart_kit import VALUE_SETS, Pod, named, of_kind, pod_of, render
from tests.unit.deploy.test_chart_flags import config_of, processes


def mounted(pod: Pod) -> dict[str, str]:
    """Secrets by where they are mounted."""
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod.spec["volumes"] if "secret" in v}
    mounts = pod.container["volumeMounts"]
    return {m["mountPath"]: secrets[m["name"]] for m in mounts if m["name"] in secrets}


def files(config: Any, *options: str) -> list[str]:
    return [PurePosixPath(getattr(config, option)).name for option in options]


def test_processes_show_one_another_a_certificate() -> None:
    for pod, config in processes(VALUE_SETS["tls"]):
        assert mounted(pod)["/etc/baton/tls"] == "members-tls"
        assert files(config, "tls_cert", "tls_key", "tls_ca") == ["tls.crt", "tls.key", "ca.crt"]
        assert config.tls_peer_name == "baton"


def test_clients_speak_tls_with_conductors_only() -> None:
    for pod, config in processes(VALUE_SETS["tls"]):
        if pod.component != "conductor":
            assert "/etc/baton/client-tls" not in mounted(pod)
            continue
        assert mounted(pod)["/etc/baton/client-tls"] == "clients-tls"
        assert files(config, "ssl_certfile", "ssl_keyfile") == ["tls.crt", "tls.key"]
        probes = [pod.container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
        assert {probe["httpGet"]["scheme"] for probe in probes} == {"HTTPS"}


def test_who_scrapes_and_who_tests_speak_tls_with_conductors() -> None:
    objects = render(VALUE_SETS["tls"])
    (endpoint,) = of_kind(objects, "ServiceMonitor")[0]["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"
    test = pod_of(objects, "test")
    assert "--url=https://baton:80" in test.container["args"]
    (ca,) = [e["value"] for e in test.container["env"] if e["name"] == "BATON_CA_FILE"]
    assert mounted(test)[str(PurePosixPath(ca).parent)] == "clients-tls"
    (port,) = [
        port
        for port in named(objects, "Service", "baton")["spec"]["ports"]
        if port["name"] == "http"
    ]
    assert port["appProtocol"] == "https"


def test_cert_manager_makes_what_is_mounted() -> None:
    values = VALUE_SETS["tls-by-cert-manager"]
    made = {
        each["spec"]["secretName"]: each["spec"] for each in of_kind(render(values), "Certificate")
    }
    for pod, config in processes(values):
        between = made[mounted(pod)["/etc/baton/tls"]]
        assert between["dnsNames"] == [config.tls_peer_name] == ["baton.internal"]
        assert {"server auth", "client auth"} <= set(between["usages"])
    front = made[mounted(pod_of(render(values), "conductor"))["/etc/baton/client-tls"]]
    assert front["dnsNames"] == ["llm.example.com"]
    assert front["issuerRef"] == {"name": "public", "kind": "ClusterIssuer"}


def test_a_front_certificate_is_for_the_service_unless_it_says_otherwise() -> None:
    values = {"tls": {"clients": {"enabled": True, "issuerRef": {"name": "ours"}}}}
    (made,) = of_kind(render(values), "Certificate")
    assert made["spec"]["dnsNames"] == ["baton", "baton.llm", "baton.llm.svc"]


@pytest.mark.parametrize(("name", "keys"), [("tenants", "keys.txt"), ("tenants-in-redis", "redis")])
def test_conductors_alone_have_the_keys_of_tenants(name: str, keys: str) -> None:
    values = VALUE_SETS[name]
    assert files(config_of(values, "conductor"), "tenants", "keys") == ["tenants.yaml", keys]
    for pod, _ in processes(values):
        assert ("tenants" in mounted(pod).values()) == (pod.component == "conductor")


def test_helm_test_has_a_key() -> None:
    env = pod_of(render(VALUE_SETS["tenants"]), "test").container["env"]
    (key,) = [each["valueFrom"]["secretKeyRef"] for each in env if each["name"] == "BATON_API_KEY"]
    assert key == {"name": "key-of-tests", "key": "key"}


def test_every_process_reaches_a_secured_redis() -> None:
    for pod, config in processes(VALUE_SETS["external-redis-secured"]):
        assert config.redis_username == "baton"
        assert files(config, "redis_password_file") == ["password"]
        options = ("redis_ca_file", "redis_cert_file", "redis_key_file")
        assert files(config, *options) == ["ca.crt", "tls.crt", "tls.key"]
        secrets = mounted(pod)
        assert secrets["/etc/baton/redis-password"] == "redis-password"
        assert secrets["/etc/baton/redis-tls"] == "redis-tls"


def test_conductors_export_traces() -> None:
    config = config_of(VALUE_SETS["traced"], "conductor")
    assert config.otlp_endpoint == "http://collector.monitoring:4317"
    assert config.trace_sample == 0.05


def test_nothing_is_mounted_that_was_not_asked_for() -> None:
    assert all(mounted(pod) == {} for pod, _ in processes({}))
