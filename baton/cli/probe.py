"""Prints what it found of one library as JSON: `python -m baton.cli.probe torch|nixl|transports`.

`baton doctor` runs this in processes of their own: a broken driver then ends a probe, not the
command, and the command stays without torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys


def torch() -> dict[str, object]:
    """Version, CUDA devices, Triton."""
    import torch as library

    devices = range(library.cuda.device_count())
    return {
        "version": library.__version__,
        "cuda": library.version.cuda,
        "gpus": [
            f"{library.cuda.get_device_name(index)}, "
            f"{library.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
            for index in devices
        ],
        "triton": importlib.util.find_spec("triton") is not None,
    }


def nixl() -> dict[str, object]:
    """The plugins that were found, and whether the one that we use can be created."""
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent("doctor", nixl_agent_config(backends=[], enable_prog_thread=False))
    agent.create_backend("UCX")
    return {"plugins": sorted(agent.get_plugin_list())}


def transports() -> dict[str, object]:
    """Which ways to move KV work between processes here, and why the others do not."""
    from baton.kv.transport.registry import available

    found = [transport for transport in available() if transport.name != "loopback"]
    return {
        "usable": [
            f"{transport.name} ({transport.reason})" for transport in found if transport.usable
        ],
        "missing": [f"{t.name} ({t.reason})" for t in found if not t.usable],
    }


if __name__ == "__main__":
    print(
        "\n" + json.dumps({"torch": torch, "nixl": nixl, "transports": transports}[sys.argv[1]]())
    )
    sys.stdout.flush()
    os._exit(0)  # UCX can crash in the loader's clean-up at exit; there is nothing left to clean
