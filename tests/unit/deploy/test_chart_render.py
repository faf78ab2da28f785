"""What the chart makes of many value sets, checked against Kubernetes' own schemas."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache

import helm_python
import kubernetes_validate
import pytest

from tests.unit.deploy.chart_kit import (
    CHART,
    FIRST_WITH_IMAGE_VOLUMES,
    VALUE_SETS,
    Values,
    example,
    named,
    render,
    render_files,
)
from tests.unit.deploy.golden import FOLDER, NAMES, golden_text

VERSIONS = ("1.27", "1.30", "1.33", "1.35", "1.37")
# Of the Prometheus Operator, and of cert-manager.
WITHOUT_SCHEMA = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "Certificate"}
LONG = "a-release-whose-name-is-as-long-as-helm-lets-it-be-xx"


@pytest.fixture(autouse=True, scope="module")
def schemas_are_read_once() -> Iterator[None]:
    read = kubernetes_validate.utils.schema_contents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", cache(read))
        yield


@cache
def validate(text: str, version: str) -> None:
    kubernetes_validate.validate(json.loads(text), version, strict=True)


@pytest.mark.parametrize("name", ["default", "one-node", "2p2d-rdma", "large"])
def test_lint_finds_nothing(name: str) -> None:
    report = helm_python.lint(CHART, dict(VALUE_SETS[name]), strict=True)
    assert report["errors"] == []
    assert [each["error"] for each in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_objects_are_valid(values: Values) -> None:
    uri = values.get("modelArtifacts", {}).get("uri", "")
    versions = [v for v in VERSIONS if v >= FIRST_WITH_IMAGE_VOLUMES or "oci://" not in uri]
    for each in render(values):
        if each["kind"] not in WITHOUT_SCHEMA:
            for version in versions:
                validate(json.dumps(each, sort_keys=True), version)


def test_strict_validation_finds_what_does_not_exist() -> None:
    service = copy.deepcopy(named(render({}), "Service", "baton"))
    service["spec"]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        validate(json.dumps(service), VERSIONS[-1])


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_names_are_unique(values: Values) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in render(values)]
    assert len(names) == len(set(names))


def test_names_fit_for_the_longest_release() -> None:
    for each in render({"kvstore": {"enabled": True}}, release=LONG):
        assert len(each["metadata"]["name"]) <= 56  # room for what Kubernetes appends, within 63
        assert all(len(label) <= 63 for label in each["metadata"]["labels"].values())


def test_a_release_of_the_chart_s_name_is_not_called_twice() -> None:
    names = {release: render({}, release)[0]["metadata"]["name"] for release in ("baton", "prod")}
    assert names == {"baton": "baton-conductor", "prod": "prod-baton-conductor"}


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_manifests_have_no_empty_lines_within(values: Values) -> None:
    for name, text in render_files(values).items():
        lines = text.strip().splitlines()
        between = {n + 1 for n, line in enumerate(lines) if line == "---"}
        empty = [n for n, line in enumerate(lines) if not line.strip() and n not in between]
        assert name == "NOTES.txt" or not empty, (name, lines[max(0, empty[0] - 2) : empty[0] + 2])


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    """`python -m tests.unit.deploy.golden` renews them."""
    assert golden_text(name) == (FOLDER / f"{name}.yaml").read_text()


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (CHART / "examples").iterdir()} <= VALUE_SETS.keys()
    assert VALUE_SETS["large"] == example("large")


def test_notes_warn_of_what_is_open() -> None:
    assert "no keys of its own" in render_files(VALUE_SETS["reachable"])["NOTES.txt"]
    assert "no keys of its own" not in render_files({})["NOTES.txt"]
    with_keys = {**VALUE_SETS["reachable"], "apiKeys": {"existingSecret": "tenants"}}
    assert "no keys of its own" not in render_files(with_keys)["NOTES.txt"]
    assert "`helm test` needs a key" in render_files(with_keys)["NOTES.txt"]
