"""docs/results/calibration.md, of a result. What is written by hand below the mark is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from bench.calibration.results import Row, as_markdown

MARK = "<!-- Below is written by hand. -->"


def write_page(path: Path, told: Mapping[str, Any], table: Sequence[Row], worst: float) -> None:
    """`worst`: error of the runner's costs on a figure that they were fitted to."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = old.partition(MARK)[2] or "\n"
    text = "\n".join(_lines(told, table, worst))
    path.write_text(f"{text}\n\n{MARK}{kept}", encoding="utf-8")


def _lines(told: Mapping[str, Any], table: Sequence[Row], worst: float) -> Iterator[str]:
    machine = told["machine"]
    yield "# A calibrated simulation next to real clusters"
    yield ""
    yield _wrapped(
        f"`{told['command']}` ([calibration.json](calibration.json)), {told['time'][:10]}, on "
        f"{machine['processor']} with {machine['cpus_of_machine']} cores, revision "
        f"{told['revision']}. What is calibrated and what the simulator makes of it says "
        "[sim.md](../sim.md#cost-model)."
    )
    yield ""
    yield _wrapped(
        f"{len(told['planned'])} requests, Poisson, {told['rate_per_s']:.2f} per second; prompts "
        f"of {_or(told['prompts'])} tokens and answers of {_or(told['outputs'])}, equally often; "
        f"a model of the shape `{told['shape']}` with random weights. Every run has the same "
        "arrivals and lengths, and so has the simulation; the error is that of the prediction, "
        "relative to the mean of the runs."
    )
    yield ""
    yield as_markdown(table)
    yield ""
    yield f"The largest error is {max(abs(row.error) for row in table):.1%}."
    yield ""
    yield from _runs(told)
    yield ""
    yield from _calibration(told["calibration"], worst)


def _runs(told: Mapping[str, Any]) -> Iterator[str]:
    yield _wrapped(
        "Means of what a first token waits for at the worker (a prompt that joins the next step "
        "has no queue: it waits in its prefill), and CPU seconds by process; `others` is what the "
        "rest of the machine took meanwhile."
    )
    yield ""
    yield "| | queue + prefill, ms | front | prefill | decode | others |"
    yield "| --- |" + " ---: |" * 5
    for cluster, runs in told["measured"].items():
        for number, run in enumerate(runs):
            used = run["cpu_s"]
            cells = [f"{used[role]:.1f}" for role in ("front", "prefill", "decode", "others")]
            waits = _waits_ms(run["ttft_parts"])
            yield f"| {cluster}, run {number + 1} | {waits} | {' | '.join(cells)} |"
        parts = told["predicted"][cluster]["ttft_parts"]
        yield f"| {cluster}, predicted | {_waits_ms(parts)} | | | | |"


def _waits_ms(parts: Mapping[str, float]) -> str:
    if not parts:
        return "-"
    return f"{(parts['queue'] + parts['fetch'] + parts['prefill']) * 1e3:.1f}"


def _calibration(found: Mapping[str, Any], worst: float) -> Iterator[str]:
    serving = found["serving"]
    yield _wrapped(
        f"The calibration: the costs of a bare runner are at most {worst:.1%} off the figures that "
        f"they are fitted to ({found['device']}). Beyond these, in ms:"
    )
    yield ""
    yield "| | ms |"
    yield "| --- | ---: |"
    for name, seconds in serving["overheads"].items():
        yield f"| `{name.removesuffix('_s')}` | {seconds * 1e3:.4f} |"
    yield ""
    slow = [
        f"{kind} beside {other} × {times:.2f}"
        for kind, others in serving["beside"].items()
        for other, times in others.items()
    ]
    yield _wrapped(f"Slower beside a busy core: {', '.join(slow)}.")


def _wrapped(text: str) -> str:
    return fill(text, 130, break_long_words=False, break_on_hyphens=False)


def _or(sizes: Sequence[int]) -> str:
    return f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"
