"""The chart, rendered by Helm's own engine, and what the tests ask of its objects."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

import baton

ROOT = Path(baton.__file__).parents[1]
CHART = ROOT / "deploy/helm/baton"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
RELEASE, NAMESPACE = "baton", "llm"

Object = dict[str, Any]
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Pod:
    """The pod template of a workload, or a pod by itself."""

    owner: Object
    labels: Mapping[str, str]
    spec: Object

    @property
    def component(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "")

    @property
    def container(self) -> Object:
        (only,) = self.spec["containers"]
        assert isinstance(only, dict)
        return only


@cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def example(name: str) -> Values:
    values = yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text())
    assert isinstance(values, dict)
    return values


def render_files(values: Values, release: str = RELEASE) -> dict[str, str]:
    """The text of each template that says something, by its file name."""
    found = chart().render(dict(values), name=release, namespace=NAMESPACE)
    texts = {path.partition("/templates/")[2]: text for path, text in found.items()}
    return {name: text for name, text in sorted(texts.items()) if text.strip()}


def render(values: Values, release: str = RELEASE) -> list[Object]:
    """All objects, not to be changed. Raises HelmError where the chart refuses the values."""
    return _render(json.dumps(values), release)


@cache
def _render(values: str, release: str) -> list[Object]:
    texts = render_files(json.loads(values), release)
    manifests = "\n---\n".join(text for name, text in texts.items() if name != "NOTES.txt")
    return [each for each in yaml.load_all(manifests, Loader=LOADER) if each]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (only,) = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    return only


def pods(objects: list[Object]) -> list[Pod]:
    return [pod for each in objects if (pod := _pod(each)) is not None]


def pod_of(objects: list[Object], component: str) -> Pod:
    (only,) = [pod for pod in pods(objects) if pod.component == component]
    return only


def _pod(owner: Object) -> Pod | None:
    if owner["kind"] == "Pod":
        return Pod(owner, owner["metadata"]["labels"], owner["spec"])
    template = owner.get("spec", {}).get("template")
    return template and Pod(owner, template["metadata"]["labels"], template["spec"])


def selects(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


def environment(container: Object, secret: str = "given") -> dict[str, str]:
    """The variables that the kubelet would set, `secret` for what comes from a Secret."""
    found: dict[str, str] = {}
    for entry in container.get("env", []):
        if "value" in entry:
            value = expand(entry["value"], found)
        elif "secretKeyRef" in entry["valueFrom"]:
            value = f"redis://:{secret}@redis:6379" if entry["name"] == "BATON_REDIS" else secret
        else:
            value = {"status.podIP": "10.0.0.7"}.get(
                entry["valueFrom"]["fieldRef"]["fieldPath"], "some-name"
            )
        found[entry["name"]] = value
    return found


def expand(text: str, variables: Mapping[str, str]) -> str:
    """As the kubelet does: `$(NAME)` of a variable that is not there stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), text)


ISSUER = {"name": "our-ca", "kind": "Issuer"}
EXTERNAL_REDIS = {"enabled": False, "external": {"url": "rediss://redis.example.com:6380"}}
GPU = {"device": "cuda", "resources": {"limits": {"nvidia.com/gpu": 1}}}
ALONE = {"conductor": {"replicas": 1}, "redis": {"enabled": False}}
FIRST_WITH_IMAGE_VOLUMES = "1.33"

VALUE_SETS: dict[str, Values] = {
    "default": {},
    "one-node": example("one-node"),
    "2p2d-rdma": example("2p2d-rdma"),
    "large": example("large"),
    "alone": ALONE,
    "external-redis-url": {"redis": EXTERNAL_REDIS},
    "external-redis-secured": {
        "redis": {
            "enabled": False,
            "external": {
                "url": "rediss://redis.example.com:6380",
                "username": "baton",
                "passwordSecret": "redis-password",
                "tlsSecret": "redis-tls",
                "clientCertificate": True,
            },
        }
    },
    "external-redis-secret": {
        "redis": {
            "enabled": False,
            "external": {"existingSecret": "their-redis", "existingSecretKey": "dsn"},
        }
    },
    "given-secrets": {
        "redis": {"existingSecret": "my-redis"},
        "clusterToken": {"existingSecret": "my-token", "existingSecretKey": "secret"},
    },
    "hub-with-token": {
        "modelArtifacts": {"uri": "hf://meta-llama/Llama-3.1-8B", "authSecretName": "hub"}
    },
    "hub-on-claim": {
        "modelArtifacts": {"uri": "hf://Qwen/Qwen3-8B", "cache": {"claimName": "hub-cache"}}
    },
    "claim": {"modelArtifacts": {"uri": "pvc://models/qwen/Qwen3-8B", "name": "qwen"}},
    "claim-itself": {"modelArtifacts": {"uri": "pvc://models", "name": "qwen"}},
    "image-volume": {"modelArtifacts": {"uri": "oci://registry:5000/models/qwen3:1"}},
    "in-the-image": {"modelArtifacts": {"uri": "file:///opt/models/qwen3"}},
    "elastic": {"elastic": {"enabled": True}, "prefill": GPU, "decode": GPU},
    "store-in-pod": {"kvstore": {"enabled": True}},
    "store-with-disk": {
        "kvstore": {"enabled": True, "disk": {"sizeGiB": 100, "storageClassName": "fast"}}
    },
    "store-on-host": {
        "kvstore": {
            "enabled": True,
            "memory": {"sizeMiB": 8192, "hostPath": "/dev/shm"},
            "disk": {"sizeGiB": 100, "hostPath": "/mnt/nvme"},
        }
    },
    "store-alone": {**ALONE, "kvstore": {"enabled": True}},
    "key-for-clients": {
        "conductor": {
            "env": [
                {
                    "name": "BATON_API_KEY",
                    "valueFrom": {"secretKeyRef": {"name": "client-keys", "key": "all"}},
                }
            ]
        }
    },
    "tls": {
        "tls": {
            "internal": {"enabled": True, "existingSecret": "members-tls"},
            "clients": {"enabled": True, "existingSecret": "clients-tls"},
        },
        "kvstore": {"enabled": True},
        "serviceMonitor": {"enabled": True},
    },
    "tls-alone": {**ALONE, "tls": {"internal": {"enabled": True, "existingSecret": "members-tls"}}},
    "tls-for-clients": {
        **ALONE,
        "tls": {"clients": {"enabled": True, "existingSecret": "clients-tls"}},
    },
    "tls-by-cert-manager": {
        "tls": {
            "internal": {"enabled": True, "issuerRef": ISSUER, "peerName": "baton.internal"},
            "clients": {
                "enabled": True,
                "issuerRef": {"name": "public", "kind": "ClusterIssuer"},
                "dnsNames": ["llm.example.com"],
            },
        }
    },
    "tenants": {"apiKeys": {"existingSecret": "tenants", "testSecret": "key-of-tests"}},
    "tenants-in-redis": {"apiKeys": {"existingSecret": "tenants", "inRedis": True}},
    "traced": {"tracing": {"otlpEndpoint": "http://collector.monitoring:4317", "sample": 0.05}},
    "autoscaling": {
        "conductor": {
            "autoscaling": {"enabled": True},
            "resources": {"requests": {"cpu": "500m"}},
        }
    },
    "host-namespaces": {
        "decode": {**GPU, "hostIPC": True, "hostPID": True, "runtimeClassName": "nvidia"}
    },
    "as-root": {
        "prefill": {
            "podSecurityContext": {"runAsNonRoot": False, "runAsUser": 0},
            "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
        }
    },
    "reachable": {
        "conductor": {"service": {"type": "LoadBalancer", "annotations": {"a/b": "c"}}},
        "ingress": {"enabled": True, "className": "nginx"},
        "networkPolicy": {"clientsFrom": [{"podSelector": {}}]},
    },
    "watched": {
        "serviceMonitor": {"enabled": True, "additionalLabels": {"release": "p"}},
        "prometheusRule": {
            "enabled": True,
            "additionalLabels": {"release": "p"},
            "runbookUrl": "https://runbooks.example.com/baton",
        },
        "grafanaDashboard": {"enabled": True, "annotations": {"grafana_folder": "baton"}},
        "networkPolicy": {"metricsFrom": [{"namespaceSelector": {}}]},
        "kvstore": {"enabled": True},
    },
    "scaled": {
        "keda": {
            "enabled": True,
            "conductor": {"maxReplicas": 4},
            "prefill": {"maxReplicas": 8, "target": 4096},
            "decode": {"minReplicas": 2, "maxReplicas": 2},
        }
    },
    "unwatched": {"metrics": {"port": 0}, "serviceMonitor": {"enabled": True}},
    "bare": {
        "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False},
        "conductor": {"podDisruptionBudget": {"enabled": False}, "preStopSeconds": 0},
        "prefill": {"replicas": 0, "podDisruptionBudget": {"enabled": False}},
        "decode": {"podDisruptionBudget": {"enabled": False}, "topologySpreadConstraints": []},
    },
    "names": {"fullnameOverride": "chat", "nameOverride": "llm", "image": {"tag": "nightly"}},
    "everything-of-a-pod": {
        "imagePullSecrets": [{"name": "registry"}],
        "prefill": {
            "strategy": {"type": "Recreate"},
            "extraArgs": ["--max-num-seqs=8", "--no-prefix-caching"],
            "env": [{"name": "UCX_TLS", "value": "rc"}],
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [{"operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "high",
            "podAnnotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
            "podLabels": {"team": "llm"},
            "extraVolumes": [{"name": "more", "configMap": {"name": "theirs"}}],
            "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        },
        "redis": {"tolerations": [{"operator": "Exists"}], "nodeSelector": {"pool": "cpu"}},
    },
}
"""What users may want, one thing at a time, and the examples."""
