"""Prints what it found of one thing as JSON: `python -m baton.cli.doctor.probes NAME [...]`.

`baton doctor` runs this in processes of their own: a broken driver or a disk that hangs then ends a
probe, not the command, and the command stays without torch. An expected failure is
`{"error": ...}`.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Callable

from baton.errors import BatonError

Json = dict[str, object]


def torch() -> Json:
    """Version, CUDA and its driver, devices, Triton."""
    import torch as library

    devices = range(library.cuda.device_count())
    return {
        "version": library.__version__,
        "cuda": library.version.cuda,
        "driver_cuda": _driver_cuda(),
        "gpus": [
            {
                "name": library.cuda.get_device_name(index),
                "bytes": library.cuda.get_device_properties(index).total_memory,
                "capability": list(library.cuda.get_device_capability(index)),
            }
            for index in devices
        ],
        "triton": importlib.util.find_spec("triton") is not None,
    }


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver knows, such as 12.8; None: there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def transports() -> Json:
    """Which ways to move KV between processes there are here, why the others are not, and what
    NIXL could load."""
    from baton.kv.transport.registry import available

    found = [transport for transport in available() if transport.name != "loopback"]
    usable = [t.name for t in found if t.usable]
    return {
        "usable": usable,
        "missing": {t.name: t.reason for t in found if not t.usable},
        "plugins": _nixl_plugins() if "nixl" in usable else [],
    }


def _nixl_plugins() -> list[str]:
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent("doctor", nixl_agent_config(backends=[], enable_prog_thread=False))
    return sorted(agent.get_plugin_list())


def transfer(name: str) -> Json:
    """What another process publishes is read and compared."""
    from baton.cli.doctor.transfer import read_from_another_process

    return {"bytes_per_s": asyncio.run(read_from_another_process(name))}


def disk(directory: str) -> Json:
    from baton.cli.doctor.disk_speed import measure

    speed = measure(directory)
    return {"write": speed.write, "read": speed.read, "direct": speed.direct}


def redis() -> Json:
    """Of the Redis of the environment."""
    from baton.cli.doctor.redis_probe import ask

    return asyncio.run(ask(os.environ))


def certificates() -> Json:
    """Seconds until those of the environment end, by path."""
    from baton.cli.doctor.certificates import seconds_left

    return {"left_s": seconds_left(os.environ)}


def clock() -> Json:
    """Whether the kernel's clock is kept in step (adjtimex(2)), and by how much it may be wrong."""
    from baton.cli.doctor.kernel_clock import kernel_clock

    synchronised, error_s = kernel_clock()
    return {"synchronised": synchronised, "error_s": error_s}


_PROBES: dict[str, Callable[..., Json]] = {
    "torch": torch,
    "transports": transports,
    "transfer": transfer,
    "disk": disk,
    "redis": redis,
    "certificates": certificates,
    "clock": clock,
}


def main() -> None:
    name, *arguments = sys.argv[1:]
    try:
        found = _PROBES[name](*arguments)
    except BatonError as error:
        found = {"error": error.message}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # UCX can crash in the loader's clean-up at exit; there is nothing left to clean


if __name__ == "__main__":
    main()
