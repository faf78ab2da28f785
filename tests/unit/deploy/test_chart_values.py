"""Values that cannot work are refused with a sentence; schema and defaults name the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml

from tests.unit.deploy.chart_kit import ALONE, CHART, GPU, Values, chart, render

STORE_ON_GPUS = {"kvstore": {"enabled": True}, "decode": GPU}
BAD: dict[str, tuple[Values, str]] = {
    "typo": ({"prefil": {}}, "additional properties 'prefil' not allowed"),
    "typo-within": ({"decode": {"replica": 2}}, "at '/decode': additional properties 'replica'"),
    "text-for-number": ({"prefill": {"replicas": "2"}}, "at '/prefill/replicas': got string"),
    "no-conductor": ({"conductor": {"replicas": 0}}, "at '/conductor/replicas': minimum"),
    "dtype": ({"engine": {"dtype": "fp8"}}, "must be one of 'auto', 'float32', 'bfloat16'"),
    "block-size": ({"engine": {"blockSize": 48}}, "at '/engine/blockSize': value must be one of"),
    "shm-between-pods": ({"engine": {"transport": "shm"}}, "must be one of 'nixl', 'nccl'"),
    "bare-model": ({"modelArtifacts": {"uri": "Qwen/Qwen3-8B"}}, "'Qwen/Qwen3-8B' does not match"),
    "size": ({"prefill": {"shmSize": "8 GB"}}, "at '/prefill/shmSize': '8 GB' does not match"),
    "relative": ({"kvstore": {"memory": {"hostPath": "shm"}}}, "at '/kvstore/memory/hostPath'"),
    "off-by-yaml": ({"metrics": {"tls": False}}, "at '/metrics/tls': value must be one of"),
    "redis-url": ({"redis": {"external": {"url": "redis:6379"}}}, "at '/redis/external/url'"),
    "args-in-one": ({"decode": {"extraArgs": "--a --b"}}, "at '/decode/extraArgs': got string"),
    "two-without-redis": ({"redis": {"enabled": False}}, "more than one conductor needs Redis"),
    "two-redis": (
        {"redis": {"external": {"url": "redis://r:6379"}}},
        "redis.external and redis.enabled exclude each other",
    ),
    "two-urls": (
        {
            "redis": {
                "enabled": False,
                "external": {"url": "redis://r:6379", "existingSecret": "s"},
            }
        },
        "set one of redis.external.url and",
    ),
    "two-caches": (
        {"modelArtifacts": {"cache": {"claimName": "a", "hostPath": "/b"}}},
        "set one of modelArtifacts.cache",
    ),
    "scaling-by-nothing": (
        {"conductor": {"autoscaling": {"enabled": True}}},
        "needs conductor.resources.requests.cpu",
    ),
    "scaling-upside-down": (
        {
            "conductor": {
                "autoscaling": {"enabled": True, "minReplicas": 9},
                "resources": {"requests": {"cpu": "1"}},
            }
        },
        "minReplicas is more than maxReplicas",
    ),
    "store-of-another-type": (STORE_ON_GPUS, "set engine.dtype"),
    "memory-of-a-store": (
        {"kvstore": {"resources": {"limits": {"memory": "8Gi"}}}},
        "the memory is kvstore.memory.sizeMiB",
    ),
    "tls-without-a-certificate": (
        {"tls": {"internal": {"enabled": True}}},
        "tls.internal.enabled needs tls.internal.existingSecret, or tls.internal.issuerRef",
    ),
    "tls-with-two": (
        {"tls": {"clients": {"enabled": True, "existingSecret": "a", "issuerRef": {"name": "b"}}}},
        "set one of tls.clients.existingSecret and tls.clients.issuerRef",
    ),
    "tls-forgotten": (
        {"tls": {"clients": {"existingSecret": "a"}}},
        "tls.clients has a certificate and is off",
    ),
    "tls-peer-name": (
        {"tls": {"internal": {"peerName": "Baton_1"}}},
        "at '/tls/internal/peerName': 'Baton_1' does not match",
    ),
    "issuer": ({"tls": {"clients": {"issuerRef": {"nam": "x"}}}}, "at '/tls/clients/issuerRef'"),
    "keys-nowhere": ({"apiKeys": {"inRedis": True}}, "apiKeys needs existingSecret"),
    "keys-without-redis": (
        {**ALONE, "apiKeys": {"existingSecret": "t", "inRedis": True}},
        "apiKeys.inRedis needs Redis",
    ),
    "password-of-no-redis": (
        {"redis": {"external": {"passwordSecret": "p"}}},
        "redis.external has a user, a password or a certificate, and no url",
    ),
    "certificate-without-tls": (
        {"redis": {"enabled": False, "external": {"url": "redis://r:6379", "tlsSecret": "t"}}},
        "write redis.external.url as rediss://host:port",
    ),
    "client-certificate-of-nothing": (
        {
            "redis": {
                "enabled": False,
                "external": {"url": "rediss://r:6379", "clientCertificate": True},
            }
        },
        "clientCertificate needs redis.external.tlsSecret",
    ),
    "collector": (
        {"tracing": {"otlpEndpoint": "collector:4317"}},
        "at '/tracing/otlpEndpoint': 'collector:4317' does not match",
    ),
    "sample": ({"tracing": {"sample": 2}}, "at '/tracing/sample': maximum"),
    "flag-of-a-value": (
        {"prefill": {"extraArgs": ["--drain-timeout=90"]}},
        "prefill.extraArgs: --drain-timeout has a value of its own",
    ),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_bad_values_are_refused(values: Values, message: str) -> None:
    with pytest.raises(helm_python.HelmError) as refused:
        render(values)
    assert message in str(refused.value)


def test_what_is_mended_is_accepted() -> None:
    assert render({**STORE_ON_GPUS, "engine": {"dtype": "bfloat16"}})


def test_every_key_of_the_schema_has_a_default() -> None:
    """The other direction holds, too: a key that the schema does not know is refused."""
    schema = chart().schema
    assert schema is not None
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert list(without_default(schema, schema, defaults)) == ["global"]


def without_default(
    schema: dict[str, Any], node: dict[str, Any], defaults: Values, prefix: str = ""
) -> Iterator[str]:
    """Dotted keys. What is empty by default is Kubernetes' own, and described there."""
    node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    for key, child in node.get("properties", {}).items():
        if key not in defaults:
            yield f"{prefix}{key}"
        elif isinstance(defaults[key], dict) and defaults[key]:
            yield from without_default(schema, child, defaults[key], f"{prefix}{key}.")
