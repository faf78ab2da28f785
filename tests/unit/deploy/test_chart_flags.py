"""Every flag and variable in the manifests is one that its process knows, with a good value."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from baton.config import parse_config
from baton.errors import ConfigError
from baton.rpc.grpc_server import LIVE
from baton.worker.config import WorkerConfig
from baton.worker.serving import CLOSE_TIMEOUT_S, SERVER_GRACE_S, TOKEN_VARIABLE
from conductor import server
from conductor.config import ConductorConfig
from conductor.openai import CompletionBody
from elastic_worker.__main__ import ElasticConfig
from kvstore.config import StoreConfig
from tests.unit.deploy.chart_kit import (
    CHART,
    NAMESPACE,
    VALUE_SETS,
    Pod,
    Values,
    environment,
    expand,
    named,
    pod_of,
    pods,
    render,
    render_files,
)

CONFIGS: dict[str, type] = {
    "conductor": ConductorConfig,
    "prefill_worker": WorkerConfig,
    "decode_worker": WorkerConfig,
    "elastic_worker": ElasticConfig,
    "kvstore": StoreConfig,
}
ALL = pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)


def processes(values: Values) -> list[tuple[Pod, Any]]:
    """The pods of baton's processes, with what each would read from flags and variables."""
    ours = [pod for pod in pods(render(values)) if pod.container["command"][0] == "python"]
    return [(pod, configuration(pod)) for pod in ours]


def configuration(pod: Pod) -> Any:
    python, dash_m, module = pod.container["command"]
    assert (python, dash_m) == ("python", "-m")
    variables = environment(pod.container)
    flags = [expand(flag, variables) for flag in pod.container["args"]]
    assert not any("$(" in text for text in (*flags, *variables.values()))
    with tempfile.TemporaryDirectory() as directory:
        flags = [from_secret(pod, flag, Path(directory)) for flag in flags]
        return parse_config(CONFIGS[module], flags, variables, module)


def from_secret(pod: Pod, flag: str, directory: Path) -> str:
    """A flag that names a file of a mounted Secret: with a file that there is."""
    path = Path(flag.partition("=")[2])
    mounts = {mount["mountPath"]: mount for mount in pod.container["volumeMounts"]}
    if not path.is_relative_to("/etc/baton"):
        return flag
    assert mounts[str(path.parent)]["readOnly"]
    file = directory / path.relative_to("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("secret")
    return f"{flag.partition('=')[0]}={file}"


def config_of(values: Values, component: str) -> Any:
    (found,) = [config for pod, config in processes(values) if pod.component == component]
    return found


@ALL
def test_processes_accept_their_flags(values: Values) -> None:
    found = {pod.component for pod, _ in processes(values)}
    assert found - {"kvstore"} == {"conductor", "prefill", "decode"}


@ALL
def test_no_flag_is_given_twice(values: Values) -> None:
    for pod, _ in processes(values):
        flags = [flag.partition("=")[0] for flag in pod.container["args"]]
        assert len(flags) == len(set(flags))


@ALL
def test_flags_of_the_chart_cannot_be_given_by_hand(values: Values) -> None:
    listed = re.search(r"\^--\(([^)]*)\)", (CHART / "templates/_helpers.tpl").read_text())
    assert listed is not None
    for pod, _ in processes({**values, **without_extra_args(values)}):
        flags = {flag.partition("=")[0].removeprefix("--") for flag in pod.container["args"]}
        assert flags <= set(listed[1].split("|"))


def without_extra_args(values: Values) -> Values:
    parts = ("conductor", "prefill", "decode", "kvstore")
    return {part: {**values.get(part, {}), "extraArgs": []} for part in parts}


@ALL
def test_every_process_has_the_cluster_token(values: Values) -> None:
    for pod, _ in processes(values):
        assert environment(pod.container)[TOKEN_VARIABLE]


@ALL
def test_members_find_conductors(values: Values) -> None:
    objects = render(values)
    configs = {pod.component: config for pod, config in processes(values)}
    conductor = configs.pop("conductor")
    for config in configs.values():
        assert config.redis == conductor.redis
        assert config.cluster_name == conductor.cluster_name
        if config.redis:
            continue
        ((host, _, port),) = [address.partition(":") for address in config.conductor]
        service = named(objects, "Service", host)
        assert service["spec"]["publishNotReadyAddresses"]  # not ready before there are workers
        assert service["spec"]["ports"][0]["port"] == int(port)
        assert int(port) == (conductor.internal_port or conductor.grpc_port)
        deployment = pod_of(objects, "conductor").owner
        assert deployment["spec"]["strategy"] == {"type": "Recreate"}  # see conductor.yaml
        assert deployment["spec"]["replicas"] == 1


@ALL
def test_workers_and_stores_agree_on_what_they_share(values: Values) -> None:
    members = [config for pod, config in processes(values) if pod.component != "conductor"]
    for key in ("model", "model_name", "dtype", "block_size", "transport", "node"):
        assert len({getattr(config, key) for config in members}) == 1, key
    models = {(config.model, config.model_name) for _, config in processes(values)}
    assert len(models) == 1


@ALL
def test_pods_have_the_time_that_their_process_takes_to_end(values: Values) -> None:
    for pod, config in processes(values):
        hook = pod.container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
        wait = float(hook.get("command", ["sleep", "0"])[1])
        if pod.component == "conductor":
            closing = server.CANCEL_S + 2 * server.CLOSE_S
        else:
            closing = 2 * CLOSE_TIMEOUT_S + SERVER_GRACE_S
        grace = pod.spec["terminationGracePeriodSeconds"]
        assert grace >= wait + config.drain_timeout + closing + 5


@ALL
def test_probes_ask_the_port_that_is_listened_on(values: Values) -> None:
    for pod, config in processes(values):
        if pod.component == "conductor":
            continue
        port = int(config.listen.rpartition(":")[2])
        others = [each for each in (config.health_port, config.metrics_port) if each]
        assert [each["containerPort"] for each in pod.container["ports"]] == [port, *others]
        asked = config.health_port or port
        assert bool(config.tls_cert) == bool(config.health_port)  # probes have no certificate
        probes = {
            kind: pod.container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")
        }
        assert (
            probes["startup"]["grpc"]
            == probes["liveness"]["grpc"]
            == {"port": asked, "service": LIVE}
        )
        assert probes["readiness"]["grpc"] == {"port": asked}  # registered with a conductor


def test_probes_of_conductors() -> None:
    container = pod_of(render({}), "conductor").container
    config = config_of({}, "conductor")
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"http": config.port, "grpc": config.grpc_port}
    paths = [
        container[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "readiness", "liveness")
    ]
    assert paths == ["/health", "/ready", "/health"]


@pytest.mark.parametrize("seconds", [5, 7, 900])
def test_start_up_gets_its_time(seconds: int) -> None:
    for pod in pods(render({"startupTimeoutSeconds": seconds, "kvstore": {"enabled": True}})):
        if pod.component in ("conductor", "prefill", "decode", "kvstore"):
            probe = pod.container["startupProbe"]
            assert seconds <= probe["periodSeconds"] * probe["failureThreshold"] < seconds + 5


@pytest.mark.parametrize(
    ("name", "model", "served"),
    [
        ("default", "", ""),
        ("hub-with-token", "meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("claim", "/model/qwen/Qwen3-8B", "qwen"),
        ("claim-itself", "/model", "qwen"),
        ("image-volume", "/model", "qwen3"),
        ("large", "/model/model", "qwen3-32b"),
        ("in-the-image", "/opt/models/qwen3", "qwen3"),
    ],
)
def test_models(name: str, model: str, served: str) -> None:
    for pod, config in processes(VALUE_SETS[name]):
        assert (config.model, config.model_name) == (model, served)
        mounted = {mount["mountPath"] for mount in pod.container["volumeMounts"]}
        assert ("/model" in mounted) == model.startswith("/model")
        assert ("/model-cache" in mounted) == ("HF_HOME" in environment(pod.container))


def test_the_hub_s_token_comes_from_its_secret() -> None:
    for pod, _ in processes(VALUE_SETS["hub-with-token"]):
        (token,) = [each for each in pod.container["env"] if each["name"] == "HF_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "HF_TOKEN"}


def test_elastic_workers_begin_in_their_pools() -> None:
    values = VALUE_SETS["elastic"]
    assert config_of(values, "conductor").elastic
    assert [config_of(values, pool).role for pool in ("prefill", "decode")] == ["prefill", "decode"]


def test_a_store_keeps_apart_from_those_of_other_releases() -> None:
    values = VALUE_SETS["store-on-host"]
    names = {
        config_of({**values, "fullnameOverride": name}, "kvstore").memory_name for name in "ab"
    }
    assert names == {f"{NAMESPACE}-a-kvstore", f"{NAMESPACE}-b-kvstore"}


def test_links_to_services_would_be_taken_for_options() -> None:
    """Why pods turn them off: a Service called baton makes Kubernetes set BATON_PORT."""
    with pytest.raises(ConfigError, match="--port"):
        parse_config(ConductorConfig, [], {"BATON_PORT": "tcp://10.0.0.1:80"}, "conductor")


def test_clients_keys_come_from_a_secret() -> None:
    assert config_of(VALUE_SETS["key-for-clients"], "conductor").api_key == ("given",)


@pytest.mark.parametrize("name", ["default", "hub-with-token"])
def test_notes_ask_what_conductors_answer(name: str) -> None:
    """The request for the model by the name that it is served by."""
    notes = render_files(VALUE_SETS[name])["NOTES.txt"]
    asked = re.search(r"-d '(.*)'", notes)
    assert asked is not None
    body = CompletionBody.model_validate_json(asked[1])
    assert body.model == (config_of(VALUE_SETS[name], "conductor").model_name or "demo")
