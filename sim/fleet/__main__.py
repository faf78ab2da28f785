"""`python -m sim.fleet --trace FILE --cluster 8P+8D`: replay a trace in virtual time."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from baton.errors import ConfigError
from sim.fleet.cpu import CpuMeter
from sim.fleet.flags import add_spec_flags, add_trace_flags, spec_of, stream_of, workload_of
from sim.fleet.progress import ProgressLine
from sim.fleet.result import Result, encode, write_result
from sim.fleet.run import SAMPLE_S, simulate
from sim.report.page import report
from sim.report.view import View

_PROG = "python -m sim.fleet"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _check_places(options)
        spec = spec_of(options)
        requests, count = stream_of(options)
        began, line = time.monotonic(), ProgressLine(count)
        cpu = CpuMeter(count)
        if options.cpu:
            requests = cpu.watch(requests)

        def progress(ended: int, now: float) -> None:
            line.update(ended, now)
            cpu.note(ended)

        result = simulate(spec, requests, workload_of(options, count), progress, options.sample_s)
        line.clear()
        sys.stderr.write(f"simulated in {time.monotonic() - began:.1f} s\n")
        if options.cpu:
            cpu.stop()
            sys.stderr.write(f"{cpu.describe()}\n")
        _deliver(result, options)
    except ConfigError as error:
        sys.exit(f"{_PROG}: {error.message}")
    return 0


def _check_places(options: argparse.Namespace) -> None:
    """Before the work, not after it."""
    for place in (options.json, options.report):
        if place and not Path(place).parent.is_dir():
            raise ConfigError(f"there is no directory for {place}")


def _deliver(result: Result, options: argparse.Namespace) -> None:
    if options.report:
        label = options.report.name.removesuffix(".html")
        options.report.write_text(report(View(result, label)), encoding="utf-8")
    if options.json == "-":
        sys.stdout.buffer.write(encode(result))
        return
    if options.json:
        write_result(result, Path(options.json))
    sys.stdout.write(_summary(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add_trace_flags(parser, or_make=True)
    add("--sample-s", type=float, default=SAMPLE_S, help="between samples of workers and links")
    add("--cpu", action="store_true", help="say whose CPU time the simulation takes")
    add("--json", metavar="FILE", help="the result; packed if it ends in .gz; - = stdout")
    add("--report", type=Path, metavar="FILE", help="the result as an HTML page")
    add_spec_flags(parser)
    return parser


def _summary(result: Result) -> str:
    told = result.totals
    rows = [
        ("requests", ", ".join(f"{count:,} {code}" for code, count in told["codes"].items())),
        ("within the SLOs", f"{told['good_share']:.2%}, {told['goodput_per_s']:.3f} per second"),
        ("prompt tokens from caches", f"{told['cached_share']:.2%}"),
    ]
    for name, label in (("ttft_s", "TTFT"), ("tbt_mean_s", "mean TBT"), ("tbt_p90_s", "p90 TBT")):
        parts = [f"{key} {_ms(value)}" for key, value in told[name].items()]
        rows.append((label, ", ".join(parts)))
    busy = f"prefill {told['prefill_busy_s']:,.0f} s, decode {told['decode_busy_s']:,.0f} s"
    rows.append(("busy", busy))
    return "".join(f"{label:<28}{value}\n" for label, value in rows)


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
