"""The examples for Ray and KubeRay: fields and flags are known, and what is asked for is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from baton.config import parse_config as parse_process
from baton.ray.commands import Listening, conductor_command, store_command, worker_command
from baton.ray.config import ClusterConfig, load_config, parse_config
from baton.ray.place import Command, Node
from baton.ray.placement import take, why_not, wishes
from baton.worker.config import WorkerConfig
from conductor.config import ConductorConfig
from elastic_worker.__main__ import ElasticConfig
from kvstore.config import StoreConfig
from tests.unit.deploy.chart_kit import ROOT

RAY = ROOT / "deploy/ray"
EXAMPLES = ("cluster.yaml", "2p2d.yaml", "kubernetes.yaml")
MANIFESTS = ("rayjob.yaml", "raycluster.yaml")
CONFIGS: dict[str, type] = {
    "conductor": ConductorConfig,
    "prefill_worker": WorkerConfig,
    "decode_worker": WorkerConfig,
    "elastic_worker": ElasticConfig,
    "kvstore": StoreConfig,
}
# Of ray.io/v1, those that are used: KubeRay drops fields that it does not know in silence.
JOB = {
    *("entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "runtimeEnvYAML"),
    "rayClusterSpec",
}
CLUSTER = {
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec"),
    "workerGroupSpecs",
}
HEAD = {"rayStartParams", "template"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", *HEAD}
GIB = 1 << 30


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RAY / name).read_text()))


def only(name: str, kind: str) -> dict[str, Any]:
    (found,) = [each for each in objects(name) if each["kind"] == kind]
    return found


def cluster_spec(name: str) -> dict[str, Any]:
    if name == "raycluster.yaml":
        return dict(only(name, "RayCluster")["spec"])
    return dict(only(name, "RayJob")["spec"]["rayClusterSpec"])


def groups(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    return [
        {"groupName": "head", "replicas": 1, **spec["headGroupSpec"]},
        *spec["workerGroupSpecs"],
    ]


def ray_nodes(name: str, replicas: str) -> Iterator[Node]:
    """The nodes that Ray would have, with what KubeRay tells `ray start` of each pod."""
    for group in groups(name):
        params = group["rayStartParams"]
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        total = {
            "CPU": float(limits["cpu"]),
            "GPU": float(params.get("num-gpus", limits.get("nvidia.com/gpu", 0))),
            "memory": float(limits["memory"].removesuffix("Gi")) * GIB,
            # KubeRay puts the value into a shell's command line, quotes and all.
            **json.loads(json.loads(params["resources"])),
        }
        for number in range(group.get(replicas, 1)):
            yield Node(f"{group['groupName']}-{number}", f"10.0.0.{number}", total)


def commands(config: ClusterConfig) -> Iterator[Command]:
    node, conductors = (
        Node("a" * 8, "10.0.0.1"),
        (Listening("10.0.0.1:1", "10.0.0.1:2"),),
    )
    yield conductor_command(config, 0, node, None)
    for pool in config.pools:
        yield worker_command(config, pool, 0, node, conductors, "10.0.0.1:3")
    if config.store is not None:
        yield store_command(config, config.store, node, 3, conductors)


@pytest.mark.parametrize("name", EXAMPLES)
def test_processes_accept_their_flags(name: str) -> None:
    for command in commands(load_config(RAY / name, {})):
        module, *flags = command.args
        parse_process(CONFIGS[module], flags, {}, module)
        given = [flag for flag in flags if flag.startswith("--")]
        assert len(given) == len(set(given)), command


def test_the_commented_example_has_every_key_with_its_default() -> None:
    content = yaml.safe_load((RAY / "cluster.yaml").read_text())
    config, least = parse_config(content, "example"), parse_config({"pools": {"decode": {}}}, "")
    assert config.store is not None
    for part, said in (
        (ClusterConfig, content),
        (type(config.conductors), content["conductors"]),
        (type(config.pools["decode"]), content["pools"]["prefill"]),
        (type(config.store), content["store"]),
        *((type(value), content[key]) for key, value in least if key in _PARTS),
    ):
        assert set(said) == set(part.model_fields), part
    for key in (*_PARTS, "conductors"):
        if key != "engine":  # left out, the processes' own defaults count
            assert getattr(config, key) == getattr(least, key)


_PARTS = ("engine", "restart", "scale", "timeouts")


@pytest.mark.parametrize("name", MANIFESTS)
def test_fields_are_those_of_kuberay(name: str) -> None:
    if name == "rayjob.yaml":
        assert set(only(name, "RayJob")["spec"]) <= JOB
        yaml.safe_load(only(name, "RayJob")["spec"]["runtimeEnvYAML"])
    spec = cluster_spec(name)
    assert set(spec) <= CLUSTER
    assert set(spec["headGroupSpec"]) <= HEAD
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(name):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_and_services_are_valid_for_kubernetes(name: str) -> None:
    found = [each for each in objects(name) if "ray.io" not in each["apiVersion"]]
    for group in groups(name):
        labels = group["template"].get("metadata", {})
        metadata = {"name": group["groupName"], **labels}
        spec = group["template"]["spec"]
        found.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    for each in found:
        kubernetes_validate.validate(each, "1.30", strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_clients_reach_the_conductor_by_the_service(name: str) -> None:
    service = only(name, "Service")["spec"]
    head = cluster_spec(name)["headGroupSpec"]["template"]
    assert service["selector"].items() <= head["metadata"]["labels"].items()
    ports = {p["name"]: p["containerPort"] for p in head["spec"]["containers"][0]["ports"]}
    config = load_config(RAY / "kubernetes.yaml", {})
    assert ports["http"] == config.conductors.port
    assert ports["grpc"] == config.conductors.grpc_port
    assert {port["targetPort"] for port in service["ports"]} <= set(ports)


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("replicas", ["minReplicas", "maxReplicas"])
def test_the_cluster_fits_into_its_pods(name: str, replicas: str) -> None:
    config = load_config(RAY / "kubernetes.yaml", {})
    if replicas == "maxReplicas":
        grown = {n: p.model_copy(update={"replicas": p.most}) for n, p in config.pools.items()}
        config = config.model_copy(update={"pools": grown})
    nodes = list(ray_nodes(name, replicas))
    assert config.store is not None
    held: dict[str, list[Any]] = {node.id: [config.store.bundle] for node in nodes[1:]}
    for wish in wishes(config):
        assert why_not(wish, nodes, held) == ""
        take(wish, nodes, held)


def test_the_job_runs_what_the_file_says() -> None:
    said = only("rayjob.yaml", "ConfigMap")["data"]["cluster.yaml"]
    assert yaml.safe_load(said) == yaml.safe_load((RAY / "kubernetes.yaml").read_text())
    spec = only("rayjob.yaml", "RayJob")["spec"]
    path = re.fullmatch(r"baton ray up --config (\S+)", spec["entrypoint"])
    assert path is not None
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "cluster"]
    assert Path(path[1]) == Path(mount["mountPath"]) / "cluster.yaml"


@pytest.mark.parametrize("name", ["rayjob.yaml", "runtime-env.yaml"])
def test_a_job_that_is_stopped_has_time_to_drain(name: str) -> None:
    if name == "rayjob.yaml":
        environment = yaml.safe_load(only(name, "RayJob")["spec"]["runtimeEnvYAML"])
    else:
        environment = yaml.safe_load((RAY / name).read_text())
    patience_s = int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    for example in EXAMPLES:
        assert load_config(RAY / example, {}).timeouts.drain_s + 20 <= patience_s


def test_the_version_of_ray_is_the_pinned_one() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    for name in MANIFESTS:
        assert cluster_spec(name)["rayVersion"] == pinned[1]
