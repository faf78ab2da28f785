"""Log lines are single lines; metric names share the prefix."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from baton.logs import setup_logging, traced
from baton.telemetry import Metrics
from baton.types.trace import TraceContext


@pytest.fixture(autouse=True)
def _restore_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_one_line_per_record_with_its_traceback() -> None:
    out = io.StringIO()
    setup_logging("info", "decode-0", out)
    log = logging.getLogger("baton.test")
    log.debug("hidden")
    log.info("two\nlines")
    try:
        raise ValueError("oops")
    except ValueError:
        log.exception("failed")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("Z INFO decode-0 baton.test: two | lines")
    assert "failed | Traceback" in lines[1]
    assert lines[1].endswith("ValueError: oops")


def test_setting_up_again_replaces_the_handler() -> None:
    first, second = io.StringIO(), io.StringIO()
    setup_logging("info", "a", first)
    setup_logging("warning", "b", second)
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud")
    assert first.getvalue() == ""
    assert "WARNING b x: loud" in second.getvalue()


def test_metrics_are_rendered_from_their_own_registry() -> None:
    metrics = Metrics()
    metrics.counter("baton_tokens", "tokens", ("kind",)).labels("output").inc(3)
    metrics.gauge("baton_running", "sequences").set(2)
    metrics.histogram("baton_step_seconds", "steps", (0.1, 1.0)).observe(0.5)
    text = metrics.render().decode()
    assert 'baton_tokens_total{kind="output"} 3.0' in text
    assert "baton_running 2.0" in text
    assert 'baton_step_seconds_bucket{le="1.0"} 1.0' in text
    assert b"baton" not in Metrics().render()


def test_metric_names_have_the_prefix() -> None:
    with pytest.raises(ValueError, match="baton_running"):
        Metrics().gauge("running", "sequences")


def test_what_is_counted_per_token_reads_like_the_librarys_metrics() -> None:
    metrics = Metrics()
    metrics.tally("baton_things", "things").value += 3
    ours = metrics.distribution("baton_ours_seconds", "times", (0.1, 1.0, 5))
    theirs = metrics.histogram("baton_theirs_seconds", "times", (0.1, 1.0, 5))
    for value in (0.05, 0.1, 0.5, 7.0):
        ours.observe(value)
        theirs.observe(value)
    lines = [line for line in metrics.render().decode().splitlines() if "_created" not in line]
    assert "baton_things_total 3.0" in lines
    ours_text = [line for line in lines if "_ours_" in line]
    assert len(ours_text) == 8
    assert [line.replace("theirs", "ours") for line in lines if "_theirs_" in line] == ours_text


async def test_lines_about_a_traced_attempt_name_the_trace() -> None:
    out = io.StringIO()
    setup_logging("info", "decode-0", out)
    context = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", True)
    log = logging.getLogger("test")

    async def later() -> None:
        log.info("in a task")

    with traced(context):
        log.info("within")
        task = asyncio.create_task(later())
        with traced(None):
            log.info("of nobody")
    log.info("behind")
    await task
    lines = {line.split("test: ")[1] for line in out.getvalue().splitlines()}
    said = f"trace={context.trace_id}"
    assert lines == {f"within {said}", f"in a task {said}", "of nobody", "behind"}
