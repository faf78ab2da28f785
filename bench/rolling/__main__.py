"""`python -m bench.rolling`: restart every process of a cluster by SIGTERM, one after the other,
under load, and count what clients lost."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.chaos.cluster import Shape
from bench.chaos.processes import ChaosFailed
from bench.chaos.questions import make_questions
from bench.rolling import report
from bench.rolling.roll import Restart, everybody
from bench.rolling.run import run


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    usual = Shape(lease_ttl_s=10.0)
    parser = argparse.ArgumentParser(prog="python -m bench.rolling", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=1, help="restarts of each process")
    add("--clients", type=int, default=4, help="that go on elsewhere when a stream breaks")
    add("--plain", type=int, default=2, help="that cannot: OpenAI's SDK behind a load balancer")
    add("--undisturbed", type=int, default=40, help="requests before the first restart")
    add(
        "--drain-timeout",
        type=float,
        default=usual.drain_timeout_s,
        help="of every process, seconds",
    )
    add("--lease-ttl", type=float, default=usual.lease_ttl_s, help="of workers and conductors")
    add("--dtype", default=usual.dtype, choices=("auto", "float32", "bfloat16"))
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write every request and restart there")
    add("--logs", type=Path, metavar="DIR", help="keep the logs of all processes there")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = _arguments(argv)
    shape = Shape(
        lease_ttl_s=options.lease_ttl, dtype=options.dtype, drain_timeout_s=options.drain_timeout
    )

    def tell(restart: Restart) -> None:
        print(report.line(restart), flush=True)

    work = run(
        shape,
        make_questions(options.seed),
        options.rounds * everybody(shape),
        (options.clients, options.plain),
        options.undisturbed,
        options.logs,
        tell,
    )
    try:
        result = asyncio.run(work)
    except ChaosFailed as error:
        print(f"rolling: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    command = shlex.join(["python", "-m", "bench.rolling", *argv])
    if options.json is not None:
        text = json.dumps(report.content(command, shape, result), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(report.as_markdown(command, result))
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
