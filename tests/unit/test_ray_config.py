"""cluster.yaml: what is accepted, and what is said about what is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from baton.cli.main import app
from baton.errors import ConfigError
from baton.ray import up
from baton.ray.commands import Listening, conductor_command, flags_of, store_command, worker_command
from baton.ray.config import ClusterConfig, load_config, parse_config
from tests.unit.ray_kit import NODE_A, config, flag

SECURED = Listening("10.0.0.9:8000", "10.0.0.9:50051", "10.0.0.9:50054", "https")
CONDUCTORS = (Listening("10.0.0.9:8000", "10.0.0.9:50051"),)


def refusal(content: object) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(content, "cluster.yaml")
    return error.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "cluster.yaml must hold `key: value` lines, with `pools` among them"),
        ({}, "cluster.yaml: pools is missing"),
        ({"pools": {}}, "nobody would decode"),
        ({"pools": {"prefill": {}}}, "nobody would decode"),
        ({"pools": {"fast": {}}}, "pools.fast.role is missing"),
        ({"pools": {"decode": {"num_gpu": 1}}}, "unknown key pools.decode.num_gpu; did you mean"),
        ({"pools": {"decode": {"replicas": "two"}}}, "pools.decode.replicas: Input should be"),
        ({"pools": {"decode": {"num_gpus": 1.5}}}, "num_gpus: a part of a GPU, or whole ones"),
        ({"pools": {"decode": {"num_gpus": -1}}}, "pools.decode.num_gpus: Input should be"),
        ({"pools": {"decode": {"resources": {"GPU": 1}}}}, "GPU has a key of its own"),
        ({"pools": {"decode": {"flags": {"node": "a"}}}}, "node is set by baton ray up itself"),
        ({"pools": {"decode": {"flags": {"dtype": "bfloat16"}}}}, "set it under engine"),
        ({"pools": {"decode": {"flags": {"a": {"b": 1}}}}}, "pools.decode.flags.a: "),
        ({"pools": {"decode": {"max_replicas": 0}}}, "1 is not between min_replicas (1) and"),
        ({"pools": {"Decode": {"role": "decode"}}}, "pools.Decode: String should match"),
        ({"pools": {"decode": {"strategy": "pack"}}}, "pools.decode.strategy: Input should be"),
        ({"pools": {"decode": {}}, "stor": {}}, "unknown key stor; did you mean store?"),
        ({"pools": {"decode": {}}, "store": {"flags": {"memory-mib": 1}}}, "memory_mib has"),
        ({"pools": {"decode": {}}, "store": {"flags": {"listen": "a:1"}}}, "listen is set by"),
        (
            {
                "pools": {
                    "decode": {"max_replicas": 2},
                    "decode-b": {"role": "decode", "max_replicas": 2},
                }
            },
            "decode and decode-b are both decode pools that scale",
        ),
        (
            {"pools": {"elastic": {}, "decode": {"max_replicas": 3}}},
            "beside an elastic pool, only that one can scale",
        ),
    ],
)
def test_what_cannot_work_is_named(content: object, message: str) -> None:
    assert message in refusal(content)


def test_every_mistake_is_named_at_once() -> None:
    content = {"pools": {"decode": {"num_cpu": 1}}, "restart": {"backoff_s": 0}}
    assert len(refusal(content).splitlines()) == 2


def test_several_conductors_need_redis(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("{pools: {decode: {}}, conductors: {replicas: 2}}")
    with pytest.raises(ConfigError, match="BATON_REDIS"):
        load_config(file, {})
    assert load_config(file, {"BATON_REDIS": "redis://:secret@r:1"}).redis == "redis://:secret@r:1"


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), (None, "cannot read")])
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "cluster.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file, {})


def test_flags_are_written_as_the_processes_read_them() -> None:
    flags: dict[str, Any] = {
        "kv_memory_mib": 64,
        "prefix-caching": False,
        "elastic": True,
        "api_key": ["a", "b"],
        "memory_share": 0.5,
    }
    assert list(flags_of(flags)) == [
        *("--kv-memory-mib", "64", "--no-prefix-caching", "--elastic"),
        *("--api-key", "a", "--api-key", "b", "--memory-share", "0.5"),
    ]


def worker(wanted: ClusterConfig, pool: str = "decode", number: int = 0) -> Any:
    return worker_command(wanted, pool, number, NODE_A, CONDUCTORS, "10.0.0.1:7")


def test_members_are_told_of_conductors_or_find_them_in_redis() -> None:
    assert flag(worker(config()), "--conductor") == "10.0.0.9:50051"
    by_redis = config(redis="redis://:secret@r:1", cluster_name="blue")
    command = worker(by_redis)
    assert flag(command, "--conductor") == ""
    assert flag(command, "--cluster-name") == "blue"
    assert "secret" not in " ".join(command.args)
    assert "secret" in up.process_environ(by_redis, {})["BATON_REDIS"]


def test_a_part_of_a_gpu_is_a_part_of_its_memory() -> None:
    half = config(pools={"decode": {"num_gpus": 0.5}})
    assert flag(worker(half), "--memory-share") == "0.5000"
    given = config(pools={"decode": {"num_gpus": 0.5, "flags": {"memory_share": 0.3}}})
    assert flag(worker(given), "--memory-share") == "0.3"
    assert flag(worker(config(pools={"decode": {"num_gpus": 1}})), "--memory-share") == ""


def test_elastic_workers_begin_in_turns() -> None:
    elastic = config(pools={"elastic": {"replicas": 3}})
    roles = [flag(worker(elastic, "elastic", number), "--role") for number in range(3)]
    assert roles == ["decode", "prefill", "decode"]
    assert "--elastic" in conductor_command(elastic, 0, NODE_A, None).args


def test_what_must_agree_is_said_to_workers_and_stores() -> None:
    wanted = config(engine={"dtype": "float32", "block_size": 64}, store={"disk_dir": "/nvme"})
    assert wanted.store is not None
    store = store_command(wanted, wanted.store, NODE_A, 7, CONDUCTORS)
    for command in (worker(wanted), store):
        assert flag(command, "--dtype") == "float32"
        assert flag(command, "--block-size") == "64"
        assert flag(command, "--verify") == ""
    assert flag(store, "--disk-dir") == "/nvme"


def test_conductors_listen_on_ports_in_a_row() -> None:
    commands = [conductor_command(config(), number, NODE_A, None) for number in range(2)]
    assert [flag(command, "--port") for command in commands] == ["8000", "8001"]
    assert [flag(command, "--grpc-port") for command in commands] == ["50051", "50052"]


def test_every_process_is_told_of_its_certificate() -> None:
    files = {"cert": "/c", "key": "/k", "ca": "/a"}
    wanted = config(tls=files, store={})
    assert wanted.store is not None
    for command in (
        conductor_command(wanted, 0, NODE_A, None),
        worker_command(wanted, "decode", 0, NODE_A, (SECURED,), ""),
        store_command(wanted, wanted.store, NODE_A, 7, (SECURED,)),
    ):
        assert [flag(command, f"--tls-{key}") for key in files] == list(files.values())
        assert flag(command, "--tls-peer-name") == ""


def test_processes_share_a_token_that_is_made_once() -> None:
    environ = up.process_environ(config(), {"BATON_REDIS": "other", "BATON_LOG_LEVEL": "debug"})
    assert environ["BATON_CLUSTER_TOKEN"]
    assert environ["BATON_LOG_LEVEL"] == "debug"
    assert "BATON_REDIS" not in environ
    assert up.process_environ(config(), {"BATON_CLUSTER_TOKEN": "t"})["BATON_CLUSTER_TOKEN"] == "t"


def test_without_ray_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text("pools: {decode: {}}")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name)
    )
    done = CliRunner().invoke(app, ["ray", "up", "--config", str(tmp_path / "cluster.yaml")])
    assert isinstance(done.exception, ConfigError)
    assert "pip install 'baton-llm[ray]'" in done.exception.message


def test_with_certificates_members_are_told_the_port_for_workers() -> None:
    assert SECURED.url == "https://10.0.0.9:8000"
    wanted = config()
    worker = worker_command(wanted, "decode", 0, NODE_A, (SECURED,), "")
    assert flag(worker, "--conductor") == "10.0.0.9:50054"
    assert flag(conductor_command(wanted, 0, NODE_A, SECURED), "--internal-port") == "50054"
    assert "--internal-port" not in conductor_command(wanted, 0, NODE_A, CONDUCTORS[0]).args
