"""The systems that are measured: how each is started at its best on these cores."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.environments import Environment, transformers_environment, vllm_environment
from bench.process import Command

MAX_MODEL_LEN = 20480
MAX_SEQUENCES = 32
# KV memory on the CPU in GiB: of an engine that is alone, and of each of two. Both of those
# must hold the longest prompt of `interference`, one of them next to the streams.
_KV_GIB = {"small": (2, 1)}
_KV_GIB_OTHERS = (4, 3)

# Left to itself it takes nearly all free memory of the machine, also what parked servers need.
# 192 blocks of 256 tokens hold every workload here.
_TRANSFORMERS_MEMORY = ("--cb-num-blocks", "192", "--cb-max-batch-tokens", "2048")


@dataclass(frozen=True, slots=True)
class Place:
    """What a system is started for. `cpus` are the cores that all share, the client too."""

    model_name: str
    model: Path
    cpus: tuple[int, ...]
    ports: Sequence[int]  # enough free ones; the first is where the client asks
    device: str = "cpu"
    extra: tuple[str, ...] = ()  # flags given by the user

    @property
    def port(self) -> int:
        return self.ports[0]

    def kv_gib(self, engines: int) -> int:
        """KV memory of one of so many engines (1 or 2)."""
        return _KV_GIB.get(self.model_name, _KV_GIB_OTHERS)[engines - 1]

    @property
    def cpu_list(self) -> str:
        return ",".join(str(cpu) for cpu in self.cpus)


@dataclass(frozen=True, slots=True)
class System:
    """`commands(place, python)` says how to start it. A `peer` is what others are compared with."""

    name: str
    describe: str
    commands: Callable[[Place, Path], list[Command]]
    ready_path: str
    peer: bool = True
    text_only: bool = False
    start_timeout_s: float = 600.0
    environment: Callable[[], Environment] | None = None  # None: this interpreter's own
    devices: tuple[str, ...] = ("cpu", "cuda")
    asks_for_path: bool = False  # requests name the model by its directory


def _baton(place: Place, python: Path, *flags: str) -> list[Command]:
    argv = (
        *(str(python), "-m", "baton.cli.main", "serve", str(place.model), *flags),
        *("--host", "127.0.0.1", "--port", str(place.port), "--grpc-port", "0"),
        *("--device", place.device, "--dtype", "bfloat16", "--json"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_SEQUENCES)),
        *("--model-name", place.model_name),
        *place.extra,
    )
    return [Command(argv)]


def _baton_colocated(place: Place, python: Path) -> list[Command]:
    return _baton(place, python, "--colocated", *_baton_memory(place, 1))


def _baton_split(place: Place, python: Path) -> list[Command]:
    threads = max(1, len(place.cpus) // 2)
    return _baton(place, python, "--threads", str(threads), *_baton_memory(place, 2))


def _baton_memory(place: Place, engines: int) -> tuple[str, ...]:
    if place.device != "cpu":
        return ()
    return ("--kv-memory-mib", str(place.kv_gib(engines) << 10))


def vllm_env(place: Place, python: Path, cpus: str, engines: int = 1) -> dict[str, str]:
    """The variables of one of so many vLLM engines, on these `cpus`."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if place.device != "cpu":
        return quiet
    # As its documentation asks for on CPUs. The loader finds tcmalloc by its name.
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    return quiet | {
        "VLLM_CPU_KVCACHE_SPACE": str(place.kv_gib(engines)),
        "VLLM_CPU_OMP_THREADS_BIND": cpus,
        "LD_PRELOAD": f"libtcmalloc_minimal.so.4:{openmp}",
        "OMP_NUM_THREADS": str(cpus.count(",") + 1),
    }


def vllm_argv(place: Place, python: Path, port: int) -> tuple[str, ...]:
    return (
        *(str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(place.model)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", place.model_name),
        *("--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN)),
        *("--max-num-seqs", str(MAX_SEQUENCES), "--disable-uvicorn-access-log"),
        *place.extra,
    )


def _vllm(place: Place, python: Path) -> list[Command]:
    argv = vllm_argv(place, python, place.port)
    return [Command(argv, vllm_env(place, python, place.cpu_list))]


def _vllm_split(place: Place, python: Path) -> list[Command]:
    """Two engines on half of the cores each, and the proxy that joins them."""
    proxy, *engine_ports = place.ports[:3]
    half = max(1, len(place.cpus) // 2)
    commands = []
    for i, (port, role) in enumerate(
        zip(engine_ports, ("kv_producer", "kv_consumer"), strict=True)
    ):
        connector = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
        cpus = ",".join(str(cpu) for cpu in place.cpus[half * i :][:half] or place.cpus)
        env = {
            **vllm_env(place, python, cpus, engines=2),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(place.ports[3 + i]),
            "VLLM_KV_CACHE_LAYOUT": "HND",
        }
        argv = (*vllm_argv(place, python, port), "--kv-transfer-config", json.dumps(connector))
        commands.append(Command(argv, env))
    argv = (sys.executable, "-m", "bench.vllm_proxy", "--port", str(proxy))
    ports = ("--prefill", str(engine_ports[0]), "--decode", str(engine_ports[1]))
    return [*commands, Command((*argv, *ports))]


def _transformers(place: Place, python: Path) -> list[Command]:
    device = place.device if place.device == "cpu" else "cuda:0"
    argv = (
        *(str(python), "-m", "transformers.cli.transformers", "serve", str(place.model)),
        *("--host", "127.0.0.1", "--port", str(place.port), "--device", device),
        *("--dtype", "bfloat16", "--continuous-batching", "--log-level", "error"),
        *(_TRANSFORMERS_MEMORY if place.device == "cpu" else ()),
        *place.extra,
    )
    return [Command(argv, {"HF_HUB_OFFLINE": "1"})]


SYSTEMS = {
    system.name: system
    for system in (
        System(
            "baton",
            "co-located: one worker does prefill and decode",
            _baton_colocated,
            "/ready",
            peer=False,
            start_timeout_s=180.0,
        ),
        System(
            "baton-1p1d",
            "one prefill and one decode worker, half of the cores each",
            _baton_split,
            "/ready",
            peer=False,
            start_timeout_s=180.0,
        ),
        System(
            "vllm",
            "vLLM, one engine on all cores",
            _vllm,
            "/health",
            environment=vllm_environment,
        ),
        System(
            "vllm-1p1d",
            "two vLLM engines, half of the cores each, KV over its NixlConnector",
            _vllm_split,
            "/health",
            environment=vllm_environment,
            devices=("cpu",),
        ),
        System(
            "transformers",
            "transformers serve with continuous batching",
            _transformers,
            "/health",
            text_only=True,
            environment=transformers_environment,
            asks_for_path=True,
        ),
    )
}


def python_of(system: System, device: str) -> Path:
    """The interpreter that has the system; on the CPU, peers get an environment of their own.

    Raises EnvironmentFailed when it is not there and cannot be made.
    """
    if system.environment is None or device != "cpu":
        return Path(sys.executable)
    return system.environment().ensure()


def parse_cpus(text: str) -> tuple[int, ...]:
    """`0-1,4` as a tuple; empty = all that this process may use. Raises ValueError."""
    allowed = os.sched_getaffinity(0)
    if not text:
        return tuple(sorted(allowed))
    cpus: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        cpus.update(range(int(low), int(high or low) + 1))
    if not cpus or not cpus <= allowed:
        raise ValueError(f"--cpus {text}: this process may use {sorted(allowed)}")
    return tuple(sorted(cpus))
