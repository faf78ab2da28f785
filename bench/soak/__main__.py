"""`python -m bench.soak`: mixed load on a cluster of real processes while random ones are killed.

2 prefill and 2 decode workers, a store, 2 conductors and Redis. Ends with status 1 when a request
was lost, an answer wrong or something is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.chaos.cluster import Cluster, Shape, running
from bench.machine import origin
from bench.soak.kills import Killer
from bench.soak.load import Load
from bench.soak.report import as_markdown, errors_in, result
from bench.soak.watch import Watch

_IDLE_S = 30.0
_TELL_S = 60.0
_SETTLED = {"free", "cached"}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30.0)
    add("--rate", type=float, default=0.5, help="requests per second, Poisson")
    add("--asks", type=int, default=60, help="different requests")
    add("--pauses", type=float, nargs=2, default=(20.0, 60.0), help="seconds between kills")
    add("--spare", default="prefill-1,decode-1,conductor-1", help="never killed: memory is fitted")
    add("--sample", type=float, default=10.0, help="seconds between looks at the processes")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE")
    add("--logs", type=Path, metavar="DIR", help="keep every process's log there")
    return parser.parse_args(argv)


async def _soak(options: argparse.Namespace, logs: Path) -> dict[str, Any]:
    shape = Shape(dtype="float32")
    async with running(shape, logs) as cluster:
        urls = [cluster.url(name) for name in shape.conductor_names]
        killer = Killer(cluster, options.seed, options.spare.split(","))
        watch = Watch(cluster.kept)
        async with Load(urls, options.seed, options.asks) as load:
            await load.learn()
            print("every answer is known; the load begins", flush=True)
            disturbing = [
                asyncio.create_task(killer.run(tuple(options.pauses))),
                asyncio.create_task(watch.run(options.sample)),
                asyncio.create_task(_tell(load, killer)),
            ]
            try:
                await _while(disturbing, load.run(options.rate, options.minutes * 60))
            finally:
                for task in disturbing:
                    task.cancel()
                await asyncio.gather(*disturbing, return_exceptions=True)
        busy = await _blocks_in_use(cluster)
        left = await cluster.stop()
    return result(load, killer.kills, watch, left, busy)


async def _while(disturbing: Sequence[asyncio.Task[None]], work: Any) -> None:
    """Await `work`; what disturbs must not end before it."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task, *disturbing}, return_when=asyncio.FIRST_COMPLETED)
    for other in disturbing:
        if other.done():
            task.cancel()
            other.result()
    await task


async def _tell(load: Load, killer: Killer) -> None:
    """Until cancelled."""
    told = 0
    while True:
        await asyncio.sleep(_TELL_S)
        print(dict(load.tally.outcomes), f"{len(killer.kills)} strikes", flush=True)
        for noted in load.tally.noted[told:]:
            print(noted, flush=True)
        told = len(load.tally.noted)


async def _blocks_in_use(cluster: Cluster) -> dict[str, Any]:
    """Members with blocks that are neither free nor cached though nothing is asked any more."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _IDLE_S
    await cluster.all_live(_IDLE_S * 4)
    while True:
        busy = {}
        for conductor in cluster.shape.conductor_names:
            for name, member in (await cluster.members(conductor)).items():
                held = {s: n for s, n in member["blocks"].items() if n and s not in _SETTLED}
                if held or member["running"] or member["waiting"]:
                    busy[f"{name} at {conductor}"] = held
        if not busy or loop.time() > deadline:
            return busy
        await asyncio.sleep(0.2)


def main(argv: Sequence[str]) -> int:
    options = _arguments(argv)
    with TemporaryDirectory() as made:
        logs = options.logs or Path(made)
        told = asyncio.run(_soak(options, logs))
        told["log_errors"] = errors_in(logs)
    told = {
        **origin("soak", argv),
        **told,
    }
    print(as_markdown(told))
    if options.json is not None:
        options.json.write_text(json.dumps(told) + "\n")
    left = told["left"]
    bad = {"lost", "wrong"} & set(told["requests"])
    return int(
        bool(
            bad
            or left["processes"]
            or left["segments"]
            or left["files"]
            or told["blocks_in_use_at_the_end"]
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
