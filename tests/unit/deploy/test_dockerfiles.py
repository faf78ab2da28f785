"""The rules of hadolint that matter here, because nothing else looks at the Dockerfiles."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton import __version__
from tests.unit.deploy.chart_kit import ROOT, chart

FILES = sorted((ROOT / "deploy/docker").glob("*.Dockerfile"))
ALL = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


@dataclass(frozen=True, slots=True)
class Step:
    keyword: str
    text: str


def steps(source: str) -> list[Step]:
    lines = [line for line in source.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    parted = [line.partition(" ") for line in whole if line.strip()]
    return [Step(keyword.upper(), text.strip()) for keyword, _, text in parted]


def complaints(source: str) -> Iterator[str]:
    all_steps = steps(source)
    last_stage = max(n for n, step in enumerate(all_steps) if step.keyword == "FROM")
    final = all_steps[last_stage:]
    for step in all_steps:
        match step.keyword:
            case "FROM" if not re.match(r"\S+:(?!latest\b)[\w.-]*\d[\w.-]*( AS \w+)?$", step.text):
                yield f"the base is not pinned by a tag: {step.text}"
            case "ADD":
                yield f"COPY says what it does, ADD does not: {step.text}"
            case "RUN" if "apt-get install" in step.text:
                if "--no-install-recommends" not in step.text or "apt-get update" not in step.text:
                    yield f"apt-get without update or --no-install-recommends: {step.text}"
                if not step.text.endswith("rm -rf /var/lib/apt/lists/*"):
                    yield f"apt's lists stay in the layer: {step.text}"
            case "RUN" if "pip install" in step.text and "-c /src/constraints.txt" not in step.text:
                yield f"pip installs what is not pinned: {step.text}"
            case "ENV" | "ARG" if re.search(r"(?i)token|password|secret", step.text):
                yield f"a secret in a layer: {step.text}"
    users = [step.text for step in final if step.keyword == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield "the last stage does not end as a user with a number other than 0"
    entries = [step.text for step in final if step.keyword == "ENTRYPOINT"]
    if len(entries) != 1 or not entries[0].startswith("["):
        yield "there is not one ENTRYPOINT in exec form"
    else:
        json.loads(entries[0])


@ALL
def test_nothing_to_complain_of(path: Path) -> None:
    assert list(complaints(path.read_text())) == []


GOOD = """
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ \\
 && rm -rf /var/lib/apt/lists/*
RUN pip install -c /src/constraints.txt torch
USER 10001:10001
ENTRYPOINT ["python", "-m"]
"""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("python:3.11-slim", "python:latest", "not pinned by a tag"),
        ("python:3.11-slim", "python", "not pinned by a tag"),
        ("USER 10001:10001", "USER root", "a number other than 0"),
        ("USER 10001:10001\n", "", "a number other than 0"),
        (" \\\n && rm -rf /var/lib/apt/lists/*", "", "lists stay"),
        (" --no-install-recommends", "", "without update or"),
        ("-c /src/constraints.txt ", "", "not pinned"),
        ('["python", "-m"]', "python -m conductor", "exec form"),
        ("USER", "ADD https://example.com/model /model\nUSER", "ADD does not"),
        ("USER", "ENV HF_TOKEN=abc\nUSER", "a secret in a layer"),
    ],
)
def test_each_rule_can_be_broken(old: str, new: str, complaint: str) -> None:
    assert list(complaints(GOOD)) == []
    found = list(complaints(GOOD.replace(old, new)))
    assert any(complaint in each for each in found), found


@ALL
def test_the_user_is_the_chart_s(path: Path) -> None:
    *_, user = [step.text for step in steps(path.read_text()) if step.keyword == "USER"]
    rights = chart().values["podSecurityContext"]
    assert user == f"{rights['runAsUser']}:{rights['runAsGroup']}"


def test_every_package_is_in_the_build_s_context() -> None:
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.rstrip("*") for name in include["packages"]["find"]["include"]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert packages <= kept
    assert {"pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE"} <= kept


def test_the_chart_is_of_this_version() -> None:
    assert chart().metadata["appVersion"] == __version__
