"""Objects find one another, and pods have no more rights than they need."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.deploy.chart_kit import (
    VALUE_SETS,
    Object,
    Pod,
    Values,
    environment,
    named,
    of_kind,
    pod_of,
    pods,
    render,
    selects,
)

ALL = pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
WITHOUT_ROOT = [values for name, values in VALUE_SETS.items() if name != "as-root"]
# Given by the value sets: objects of others.
THEIRS = {
    "Secret": {"hub", "their-redis", "my-redis", "my-token", "client-keys"}
    | {"registry", "baton-cluster", "baton-redis-url", "llm-example-com"}
    | {"members-tls", "clients-tls", "tenants", "key-of-tests", "redis-password", "redis-tls"}
    | {"baton-tenants", "baton-test-key"},
    "PersistentVolumeClaim": {"models", "hub-cache"},
    "ConfigMap": {"theirs"},
    "ServiceAccount": {"default"},
}


def bytes_of(quantity: str) -> int:
    return int(quantity[:-2]) << {"Ki": 10, "Mi": 20, "Gi": 30}[quantity[-2:]]


def only_pods(objects: list[Object], selector: dict[str, str]) -> list[Pod]:
    return [pod for pod in pods(objects) if selects(pod.labels, selector)]


@ALL
def test_workloads_select_their_own_pods(values: Values) -> None:
    objects = render(values)
    for each in of_kind(objects, "Deployment", "StatefulSet", "DaemonSet"):
        (pod,) = only_pods(objects, each["spec"]["selector"]["matchLabels"])
        assert pod.owner is each


@ALL
def test_services_lead_to_ports_that_one_kind_of_pod_has(values: Values) -> None:
    objects = render(values)
    for service in of_kind(objects, "Service"):
        (pod,) = only_pods(objects, service["spec"]["selector"])
        ports = {port["name"] for port in pod.container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


@ALL
def test_budgets_and_scalers_have_something_to_guard(values: Values) -> None:
    objects = render(values)
    for budget in of_kind(objects, "PodDisruptionBudget"):
        (pod,) = only_pods(objects, budget["spec"]["selector"]["matchLabels"])
        assert pod.owner["metadata"]["name"] == budget["metadata"]["name"]
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert "replicas" not in named(objects, target["kind"], target["name"])["spec"]


@ALL
def test_pods_are_spread_among_their_own_kind(values: Values) -> None:
    for pod in pods(render(values)):
        for constraint in pod.spec.get("topologySpreadConstraints", []):
            assert selects(pod.labels, constraint["labelSelector"]["matchLabels"])
            assert "app.kubernetes.io/component" in constraint["labelSelector"]["matchLabels"]


@ALL
def test_what_is_referred_to_exists(values: Values) -> None:
    objects = render(values)
    made = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    made |= {("Secret", each["spec"]["secretName"]): {} for each in of_kind(objects, "Certificate")}
    for each in objects:
        for kind, name, key in references(each):
            assert (kind, name) in made or name in THEIRS[kind], (kind, name)
            if key and (kind, name) in made:
                assert key in made[kind, name]["data"]


def references(node: Any) -> list[tuple[str, str, str]]:
    """(kind, name, key) of everything in an object that names another one."""
    found: list[tuple[str, str, str]] = []
    if isinstance(node, list):
        return [reference for each in node for reference in references(each)]
    if not isinstance(node, dict):
        return found
    for field, value in node.items():
        match field:
            case "secretKeyRef":
                found.append(("Secret", value["name"], value["key"]))
            case "secretName":
                found.append(("Secret", value, ""))
            case "imagePullSecrets":
                found += [("Secret", each["name"], "") for each in value]
            case "claimName":
                found.append(("PersistentVolumeClaim", value, ""))
            case "configMap":
                found.append(("ConfigMap", value["name"], ""))
            case "serviceAccountName":
                found.append(("ServiceAccount", value, ""))
            case _:
                found += references(value)
    return found


@ALL
def test_hosts_of_the_release_are_services_of_it(values: Values) -> None:
    objects = render(values)
    ports = {
        each["metadata"]["name"]: {port["port"] for port in each["spec"]["ports"]}
        for each in of_kind(objects, "Service")
    }
    for pod in pods(objects):
        for host, port in addresses(pod):
            assert port in ports[host], host


def addresses(pod: Pod) -> list[tuple[str, int]]:
    """Of what the pod connects to in this release."""
    urls = [text.rpartition("//")[2] for text in pod.container["args"] if text.startswith("--url=")]
    for flag in ("--conductor=", "--store="):
        urls += [text.removeprefix(flag) for text in pod.container["args"] if text.startswith(flag)]
    for entry in pod.container["env"]:
        if entry["name"] == "BATON_REDIS" and "$(REDIS_PASSWORD)" in entry.get("value", ""):
            urls.append(entry["value"].rpartition("@")[2])
    return [(host, int(port)) for host, _, port in (url.rpartition(":") for url in urls)]


@ALL
def test_volumes_are_mounted_and_mounts_have_volumes(values: Values) -> None:
    for pod in pods(render(values)):
        volumes = [volume["name"] for volume in pod.spec.get("volumes", [])]
        mounts = [mount["name"] for mount in pod.container["volumeMounts"]]
        assert sorted(volumes) == sorted(mounts)


@pytest.mark.parametrize("values", WITHOUT_ROOT)
def test_pods_have_no_rights(values: Values) -> None:
    for pod in pods(render(values)):
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False  # see test_chart_flags.py
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["runAsUser"] >= 999
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_a_part_may_have_other_rights_alone() -> None:
    objects = render(VALUE_SETS["as-root"])
    prefill, decode = pod_of(objects, "prefill"), pod_of(objects, "decode")
    assert prefill.spec["securityContext"]["runAsUser"] == 0
    assert prefill.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    capabilities = prefill.container["securityContext"]["capabilities"]
    assert capabilities == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert decode.spec["securityContext"]["runAsUser"] == 10001
    assert "add" not in decode.container["securityContext"]["capabilities"]


def test_host_namespaces_only_where_asked_for() -> None:
    objects = render(VALUE_SETS["host-namespaces"])
    sharing = {pod.component for pod in pods(objects) if pod.spec.get("hostPID")}
    assert (
        sharing == {pod.component for pod in pods(objects) if pod.spec.get("hostIPC")} == {"decode"}
    )


def test_what_is_written_to_is_writable() -> None:
    for pod in pods(render(VALUE_SETS["hub-with-token"])):
        places = {mount["mountPath"]: mount for mount in pod.container["volumeMounts"]}
        variables = environment(pod.container)
        for name in ("HOME", "HF_HOME"):
            assert name not in variables or not places[variables[name]].get("readOnly")


@pytest.mark.parametrize("name", ["store-in-pod", "store-on-host", "2p2d-rdma", "large"])
def test_a_store_has_room_for_its_blocks(name: str) -> None:
    """They count as its memory, wherever the files are."""
    values = VALUE_SETS[name]
    pod = pod_of(render(values), "kvstore")
    mib = values["kvstore"].get("memory", {}).get("sizeMiB", 4096)
    assert f"--memory-mib={mib}" in pod.container["args"]
    resources = pod.container["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert bytes_of(resources["limits"]["memory"]) >= (mib + 1024) << 20
    (volume,) = [each for each in pod.spec["volumes"] if each["name"] == "shm"]
    if "emptyDir" in volume:
        assert bytes_of(volume["emptyDir"]["sizeLimit"]) > mib << 20


def test_a_store_s_disk_is_larger_than_what_it_may_take() -> None:
    pod = pod_of(render(VALUE_SETS["store-with-disk"]), "kvstore")
    (volume,) = [each for each in pod.spec["volumes"] if each["name"] == "disk"]
    claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim["storageClassName"] == "fast"
    assert bytes_of(claim["resources"]["requests"]["storage"]) >= 105 << 30


def test_workers_ask_the_store_of_their_own_node() -> None:
    objects = render(VALUE_SETS["store-in-pod"])
    service = named(objects, "Service", "baton-kvstore")
    assert service["spec"]["internalTrafficPolicy"] == "Local"
    for component in ("prefill", "decode"):
        assert "--store=baton-kvstore:50053" in pod_of(objects, component).container["args"]


def test_conductors_with_redis_are_replaced_without_a_gap() -> None:
    strategy = pod_of(render({}), "conductor").owner["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_a_new_chart_alone_restarts_nothing() -> None:
    for pod in pods(render({})):
        if pod.owner["kind"] != "Pod":
            assert "helm.sh/chart" not in pod.labels


def test_policies_let_members_in_everywhere_and_clients_at_conductors() -> None:
    objects = render(VALUE_SETS["reachable"])
    members = named(objects, "NetworkPolicy", "baton")["spec"]
    clients = named(objects, "NetworkPolicy", "baton-clients")["spec"]
    everybody = {pod.component for pod in only_pods(objects, members["podSelector"]["matchLabels"])}
    assert everybody == {"conductor", "prefill", "decode", "redis", "test"}
    assert members["ingress"] == [{"from": [{"podSelector": members["podSelector"]}]}]
    (open_to_clients,) = only_pods(objects, clients["podSelector"]["matchLabels"])
    assert open_to_clients.component == "conductor"
    assert clients["ingress"][0]["from"] == [{"podSelector": {}}]


def test_the_monitor_watches_the_conductors() -> None:
    objects = render(VALUE_SETS["watched"])
    (monitor,) = of_kind(objects, "ServiceMonitor")
    assert monitor["metadata"]["labels"]["release"] == "p"
    selector = monitor["spec"]["selector"]["matchLabels"]
    (service,) = [
        each
        for each in of_kind(objects, "Service")
        if selects(each["metadata"]["labels"], selector)
    ]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"


def test_the_ingress_leads_to_the_conductors() -> None:
    objects = render(VALUE_SETS["large"])
    (ingress,) = of_kind(objects, "Ingress")
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    service = named(objects, "Service", backend["name"])
    assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
