"""The parts of `baton.bench.gpu`, each run as a process: `python -m baton.bench.gpu_parts NAME`.

A part writes `{"markdown": ..., ...}` to NAME.json in the scratch directory. Imports that are not
in the standard library happen inside of parts: what is missing here fails one part only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "transformers", "vllm", "numpy", "safetensors", "pytest")
_MARKER = "gpu: needs a CUDA device"


@dataclass(frozen=True, slots=True)
class Context:
    """What every part is told."""

    device: str
    shape: str
    quick: bool
    scratch: Path

    @property
    def weights(self) -> Path:
        """Where the part `weights` puts the model."""
        return self.scratch / "model"


Result = Mapping[str, Any]


def machine(_: Context) -> Result:
    """What this machine is, and versions."""
    facts = {
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        **{name: found for name in _PACKAGES if (found := _version(name))},
    }
    if importlib.util.find_spec("torch") is not None:
        facts |= _torch_facts()
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
    ]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=30.0
        )
        facts["nvidia-smi"] = (done.stdout or done.stderr).strip()
    except OSError as error:
        facts["nvidia-smi"] = str(error)
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return {"facts": facts, "markdown": lines + "\n"}


def _torch_facts() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"gpu": "none that torch sees"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "GPU memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def tests(context: Context) -> Result:
    """tests/gpu by a bare pytest: pyproject.toml's options are of plugins that may be missing."""
    report = context.scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-c", os.devnull, f"--rootdir={ROOT}"]
    command += ["-p", "no:cacheprovider", "-o", f"markers={_MARKER}", "-q", "--tb=short"]
    command += ["-x"] if context.quick else []
    environ = dict(os.environ)
    if context.device != "cpu":
        environ["TRITON_INTERPRET"] = "0"  # tests/conftest.py guesses by the driver's device file
    done = subprocess.run(
        [*command, f"--junitxml={report}"], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    sys.stdout.write(done.stdout + done.stderr)
    if not report.exists():
        return {"rc": done.returncode, "markdown": "pytest ended without a report\n"}
    return {"rc": done.returncode, **summarize_tests(report.read_text(encoding="utf-8"))}


def summarize_tests(xml: str) -> Result:
    """Counts and failures of a JUnit file."""
    suites = ElementTree.fromstring(xml).iter("testsuite")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failed = []
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, "0"))
        for case in suite.iter("testcase"):
            bad = next((found for kind in ("failure", "error") for found in case.iter(kind)), None)
            if bad is not None:
                failed.append({"name": case.get("name"), "message": bad.get("message", "")})
    lines = [", ".join(f"{count} {name}" for name, count in counts.items())]
    lines += [f"- {test['name']}: {test['message']}" for test in failed]
    return {**counts, "failed": failed, "markdown": "\n".join(lines) + "\n"}


def weights(context: Context) -> Result:
    """The random model that later parts load."""
    from baton.bench.engine_models import shape_named, write_random_model

    context.weights.mkdir()
    write_random_model(shape_named(context.shape), context.weights)
    size = sum(path.stat().st_size for path in context.weights.iterdir())
    return {"bytes": size, "markdown": f"{context.shape}, random, {size / 1e9:.2f} GB\n"}


def attention(context: Context) -> Result:
    """Prefill attention next to the back ends of torch's SDPA."""
    from baton.bench.gpu_attention import compare

    table = compare(context.device, context.shape, context.quick)
    return _tables([table])


def decode(context: Context) -> Result:
    """Decode steps next to the memory roofline."""
    return _bench(context, ("decode",))


def prefill(context: Context) -> Result:
    """Prompts next to the matrix ceiling."""
    return _bench(context, ("prefill",))


def steps(context: Context) -> Result:
    """What lies between an engine's steps, and where a step's time goes."""
    return _bench(context, ("profile", "loop"))


def kernels(context: Context) -> Result:
    """Every kernel alone."""
    return _bench(context, ("kernels",))


def _bench(context: Context, parts: tuple[str, ...]) -> Result:
    from baton.bench import engine_text
    from baton.bench.engine import run
    from baton.bench.engine_options import Options

    def say(name: str) -> None:
        sys.stdout.write(name + "\n")
        sys.stdout.flush()

    options = Options(
        model=str(context.weights),
        device=context.device,
        dtype="bfloat16",
        step_tokens=512 if context.quick else 8192,
        quick=context.quick,
        parts=parts,
    )
    report = run(options, say)
    return {**_tables(list(engine_text.tables(report))), "report": engine_text.as_json(report)}


def transformers(context: Context) -> Result:
    """Hugging Face's own decoder over the same weights."""
    from baton.bench.gpu_peers import transformers_decode

    return _peer(
        "transformers", lambda: transformers_decode(context.weights, context.device, context.quick)
    )


def vllm(context: Context) -> Result:
    """vLLM over the same weights."""
    from baton.bench.gpu_peers import vllm_decode

    return _peer("vllm", lambda: vllm_decode(context.weights, context.quick))


def _peer(package: str, measure: Callable[[], Any]) -> Result:
    if importlib.util.find_spec(package) is None:
        return {"markdown": f"{package} is not installed here\n"}
    return _tables([measure()])


def _tables(tables: Sequence[Any]) -> dict[str, Any]:
    from baton.bench.engine_text import markdown

    return {"markdown": "\n".join(map(markdown, tables))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


PARTS: Mapping[str, Callable[[Context], Result]] = {
    part.__name__: part
    for part in (
        *(machine, tests, weights, attention, decode, prefill, kernels, steps),
        *(transformers, vllm),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--device", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--scratch", required=True, type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    context = Context(options.device, options.shape, options.quick, options.scratch)
    result = PARTS[options.part](context)
    (context.scratch / f"{options.part}.json").write_text(json.dumps(result), encoding="utf-8")
    sys.exit(result.get("rc", 0))


if __name__ == "__main__":
    main()
