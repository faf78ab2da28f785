"""How fast one engine is on one core, and how much slower beside another on the next core.

`python -m bench.calibration.engines SHAPE CORE` is such an engine: it reads a line with a kind of
step and seconds from standard input, computes that for so long, and writes the median seconds
of a step.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from baton.cli.plan import new_environ

PROMPTS = (64, 128, 256, 512, 1024, 2048)
DECODES = ((1, 128), (1, 1024), (2, 512), (4, 128), (4, 1024), (8, 512), (16, 512))
_PREFILL_TOKENS = 512  # of a step beside others
_DECODE = (4, 512)  # sequences, and tokens of each
_ANSWER_S = 120.0  # most that a figure takes beyond its seconds
_START_S = 300.0
KINDS = ("prefill", "decode")


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """This process, and what is started here, stays on these."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def measure_engine(shape: str, core: int) -> dict[str, object]:
    """`baton bench engine --json` of one thread on one core, as a worker computes."""
    prompts = ",".join(map(str, PROMPTS))
    decodes = ",".join(f"{batch}x{context}" for batch, context in DECODES)
    argv = (
        *(sys.executable, "-m", "baton.cli.main", "bench", "engine", "--shape", shape),
        *("--threads", "1", "--dtype", "bfloat16", "--only", "prefill,decode,loop"),
        *("--prompts", prompts, "--decodes", decodes, "--json", "-"),
    )
    with on_cores([core]):
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, env=new_environ()
        )
    out, _ = await process.communicate()
    if process.returncode:
        raise SystemExit("baton bench engine failed")
    found: dict[str, object] = json.loads(out)
    return found


async def measure_beside(shape: str, cores: Sequence[int], seconds: float) -> dict[str, object]:
    """For both kinds of steps: how many times as long one takes while the other core computes one
    of either kind. Each pair follows on its kind alone: what slows the machine for long hits both.
    """
    async with _engine(shape, cores[0]) as one, _engine(shape, cores[1]) as other:
        found: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
        for kind, beside in itertools.product(KINDS, KINDS):
            alone_s = await one.median_s(kind, seconds)
            both = await asyncio.gather(
                one.median_s(kind, seconds), other.median_s(beside, seconds)
            )
            found[kind][beside] = max(1.0, both[0] / alone_s)
    return dict(found)


class _Engine:
    """Of the other side of a pipe."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def median_s(self, kind: str, seconds: float) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {seconds}\n".encode())
        return float(await self.line(seconds + _ANSWER_S))

    async def line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await self._process.stdout.readline()
        if not line:
            raise SystemExit("an engine failed")
        return line


@asynccontextmanager
async def _engine(shape: str, core: int) -> AsyncIterator[_Engine]:
    with on_cores([core]):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.calibration.engines", shape),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=new_environ(),
        )
    engine = _Engine(process)
    try:
        await engine.line(_START_S)
        yield engine
    finally:
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


def main(shape: str) -> None:
    """An engine, until standard input ends."""
    from baton.bench.engine_cost import Chunk  # torch: only here
    from baton.bench.engine_device import find_device
    from baton.bench.engine_models import shape_named, write_random_model
    from baton.bench.engine_rig import find_model, open_rig, run

    chunks: Mapping[str, list[Chunk]] = {
        "prefill": [Chunk(0, _PREFILL_TOKENS)],
        "decode": [Chunk(_DECODE[1] - 1, 1)] * _DECODE[0],
    }
    with tempfile.TemporaryDirectory() as directory:
        device = find_device("cpu", 1)
        path = write_random_model(shape_named(shape), Path(directory))
        model = find_model(path, device, "bfloat16", block_size=32)
        with open_rig(model, device, num_blocks=256) as rig:
            print("ready", flush=True)
            for line in sys.stdin:
                kind, seconds = line.split()
                batch = rig.batch(chunks[kind])
                end, samples = time.perf_counter() + float(seconds), []
                while (began := time.perf_counter()) < end:
                    run(rig.runner, [batch])
                    samples.append(time.perf_counter() - began)
                print(statistics.median(samples), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
