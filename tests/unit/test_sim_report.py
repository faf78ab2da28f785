"""Reports of simulations: complete pages, right words, and figures that are those of the result."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sim.fleet.records import Event, LinkSample, Record, Table, WorkerSample, table_of
from sim.fleet.result import Result, write_result
from sim.fleet.totals import totals
from sim.report import figures, scales, words
from sim.report.__main__ import main
from sim.report.compare import change_text, rows
from sim.report.page import comparison, report
from sim.report.scales import Scale, clock, linear, logarithmic
from sim.report.svg import Mark, Series, heat, lines
from sim.report.view import View, link_bytes, link_rates

ONE = Record(
    index=0,
    at_s=0.0,
    code="ok",
    ttft_s=1.0,
    end_s=5.0,
    prompt_tokens=1000,
    output_tokens=40,
    cached_tokens=250,
    tbt_mean_s=0.05,
    tbt_p50_s=0.05,
    tbt_p90_s=0.08,
    tbt_p99_s=0.2,
    tbt_worst_s=0.15,
    tbt_max_s=0.3,
    prefill="p0",
    decode="d10",
    predicted_ttft_s=0.8,
    queue_s=0.5,
    fetch_s=0.1,
    prefill_s=0.3,
)


def result(slow: float = 1.0, refused: int = 5) -> Result:
    """100 requests in 100 seconds: TTFT from 0.02 to 2 s, times `slow`."""
    records = table_of(
        Record,
        [
            replace(
                ONE,
                index=n,
                at_s=float(n),
                end_s=n + 10.0,
                code="overloaded" if n < refused else "ok",
                ttft_s=None if n < refused else slow * (n + 1) / 50,
            )
            for n in range(100)
        ],
    )
    workers = Table(WorkerSample)
    links = Table(LinkSample)
    for at_s in range(10, 120, 10):
        workers.append(WorkerSample(float(at_s), "p0", "prefill", 4, 2, 0.5, 5.0, 0.0))
        workers.append(WorkerSample(float(at_s), "d10", "decode", 1, 9, 0.75, 0.0, 10.0))
        workers.append(WorkerSample(float(at_s), "d2", "decode", 0, 3, 0.25, 0.0, 2.5))
    links.append(LinkSample(10.0, "p0 NIC out", 1000))
    links.append(LinkSample(30.0, "p0 NIC out", 3000))
    links.append(LinkSample(30.0, "p1 NIC out", 1000))
    links.append(LinkSample(30.0, "<d2> NIC in", 4000))
    events = table_of(Event, [Event(50.0, "d2 now computes prompts")])
    spec = {
        "cluster": "1P+2D",
        "model": "llama3-70b",
        "node": "8xA800",
        "slo_ttft_s": 1.9,
        "slo_tbt_s": 0.1,
        "note": "<script>alert(1)</script>",
    }
    told = totals(records, workers, 1.9, 0.1)
    return Result(spec, {"trace": "a.jsonl"}, told, records, workers, links, events)


VIEW = View(result(), "first")


class Outline(HTMLParser):
    """Checks that elements are closed in order, and keeps what matters of them."""

    VOID = frozenset({"meta", "line", "path", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("page", [report(VIEW), comparison([VIEW, View(result(3.0), "second")])])
def test_a_page_is_whole_and_needs_nothing_else(page: str) -> None:
    outline = Outline(page)
    tags = {tag for tag, _ in outline.attributes}
    assert not tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?:|url\(|@import", page)
    for tag, attributes in outline.attributes:
        if tag == "svg":  # either it is described or it decorates a legend
            assert attributes.get("aria-label") or attributes.get("aria-hidden")
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"  # scrolls by keyboard, too
    assert "prefers-color-scheme: dark" in page
    assert "viewport" in page
    assert all(ET.fromstring(svg) is not None for svg in re.findall(r"<svg.*?</svg>", page, re.S))
    assert not re.search(r"\b(nan|inf)\b", page)


def test_equal_results_have_equal_pages() -> None:
    assert report(View(result(), "first")) == report(VIEW)


def test_a_page_says_what_was_simulated_and_whether_slos_hold() -> None:
    text = "".join(Outline(report(VIEW)).text)
    assert "3 nodes (8xA800, disaggregated) serve llama3-70b: 1 compute prompts" in text
    assert "asked 100 requests in 99 seconds, 1.01 per second" in text
    assert "90% of all requests were answered within both SLOs" in text
    assert "TTFT holds: 90% of all requests met 1.9 s" in text
    assert "TBT holds: 95% of all requests met 100 ms" in text
    assert "not answered: overloaded" in text
    assert "d2 now computes prompts" in text
    assert "<script>alert(1)</script>" in text  # as text


def test_an_slo_does_not_hold_when_too_many_miss_it() -> None:
    slower = View(result(1.1), "slower")
    assert [holds for holds, _ in words.verdicts(slower)] == [False, True]
    refusing = View(result(refused=11), "refusing")
    assert [holds for holds, _ in words.verdicts(refusing)] == [False, False]


def test_coupled_and_unknown_fleets_have_words() -> None:
    coupled = View(replace(VIEW.result, spec={"cluster": "16M", "model": "m"}), "")
    assert words.fleet(coupled).startswith("16 nodes (coupled) serve m: each")
    assert words.fleet(View(Result({}, {}), "")) == "A cluster (not described) serves a model."


def test_a_result_of_nothing_has_a_page() -> None:
    empty = View(Result({}, {}, totals(Table(Record), Table(WorkerSample), 1, 1)), "empty")
    assert "Nothing was asked" in "".join(Outline(report(empty)).text)
    Outline(comparison([empty, VIEW]))


def test_outcomes_add_up() -> None:
    late = View(result(1.2, refused=3), "")
    assert sum(count for _, count in late.outcomes()) == 100
    assert late.outcomes() == [
        ("within both SLOs", 76),
        ("first token late", 21),
        ("not answered: overloaded", 3),
    ]


def test_requests_are_put_into_bins_of_time() -> None:
    assert VIEW.width_s == 99 / 5
    assert VIEW.binned(VIEW.answered).tolist() == [15, 20, 20, 20, 20]
    assert VIEW.bin_middles_s.tolist() == pytest.approx([9.9, 29.7, 49.5, 69.3, 89.1])


def test_the_time_to_the_first_token_is_taken_apart() -> None:
    drawn = figures.waits(VIEW)
    assert [row[:2] for row in drawn.rows[1:]] == [
        ("waited", "500 ms"),
        ("KV came", "100 ms"),
        ("computed", "300 ms"),
    ]


def test_workers_are_ordered_and_busy() -> None:
    samples = VIEW.worker_samples
    assert samples.names == ["d2", "d10", "p0"]
    assert samples.busy()[:, 0].tolist() == [0.25, 1.0, 0.5]
    assert samples.kv()[:, 3].tolist() == [0.25, 0.75, 0.5]
    assert samples.roles() == ["prefill", "decode"]
    assert samples.of_role("running", "decode")[0] == 12


def test_a_worker_that_came_later_has_no_load_before() -> None:
    table = Table(WorkerSample)
    for n in range(1, 481):
        table.append(WorkerSample(float(n), "a", "decode", 0, 0, 0.5, 0.0, 0.5))
        if n > 240:
            table.append(WorkerSample(float(n), "b", "decode", 0, 0, 1.0, 0.0, 1.0))
    samples = View(Result({}, {}, workers=table), "").worker_samples
    early, late = np.isnan(samples.busy()).sum(axis=1).tolist()
    assert (early, late) == (0, len(samples) // 2)
    assert samples.of_role("decode_s", "decode").tolist() == [0.5] * 60 + [1.5] * 60


def test_links_are_summed_by_kind() -> None:
    times, rates = link_rates(VIEW.result)
    assert times[:3].tolist() == [10, 20, 30]
    assert rates["NIC out"][:3].tolist() == [100, 0, 400]
    assert rates["NIC in"][:3].tolist() == [0, 0, 400]
    assert link_bytes(VIEW.result) == [
        ("<d2> NIC in", 4000),
        ("p0 NIC out", 4000),
        ("p1 NIC out", 1000),
    ]


def test_a_distribution_ends_at_its_largest_value() -> None:
    figure = figures.ttft([VIEW])
    assert figure.rows[1][2:] == ("1.06 s", "1.81 s", "1.98 s", "2 s")
    assert "90% within 1.81 s" in figure.plot
    path = re.search(r'class="line s0" d="([^"]+)"', figure.plot)
    assert path is not None
    assert path[1].split("L")[-1] == "466.0 28.0"  # the upper right corner


def test_lines_are_interrupted_where_there_is_nothing() -> None:
    series = Series("a", np.arange(4.0), np.array([0, np.nan, 1, 1]))
    plot = lines("t", "s", [series], Scale(0, 3, "x"), Scale(0, 1, "y"), [Mark(3.0, "SLO <1>")])
    path = re.search(r'class="line s0" d="([^"]+)"', plot)
    assert path is not None
    assert path[1].count("M") == 2
    assert "SLO &lt;1&gt;" in plot


def test_many_rows_of_a_heat_strip_are_joined() -> None:
    shares = np.repeat(np.linspace(0, 1, 1000)[:, np.newaxis], 50, axis=1)
    plot = heat("t", "s", [f"d{n}" for n in range(1000)], shares, clock(100))
    assert len(plot) < 20_000
    root = ET.fromstring(plot)
    cells = sum(path.attrib["d"].count("M") for path in root.iter("path"))
    assert cells == 64  # equal cells beside each other are one


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (linear(1.0, ""), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (linear(0.0, ""), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Scale(0, 4.2, ""), [0, 1, 2, 3, 4]),
        (logarithmic(0.05, 30, ""), [0.1, 0.3, 1, 3, 10, 30]),
        (logarithmic(0.0, 1.0, ""), [1e-9, 1e-7, 1e-5, 1e-3, 1e-1]),
        (clock(3700), [0, 1200, 2400, 3600]),
        (clock(50), [0, 10, 20, 30, 40, 50]),
    ],
)
def test_ticks_are_round(scale: Scale, ticks: list[float]) -> None:
    assert scale.ticks() == pytest.approx(ticks)


def test_numbers_are_short() -> None:
    given = (0.0, 0.05234, 3.456, 250.0, 12_500.0, 3.2e9)
    assert [scales.number(v) for v in given] == ["0", "0.0523", "3.46", "250", "12.5k", "3.2G"]
    assert [scales.seconds(v) for v in (0.0, 0.0123, 1.5, 2000)] == [
        "0 s",
        "12.3 ms",
        "1.5 s",
        "2k s",
    ]
    assert [words.share_text(v) for v in (1.0, 0.99999, 0.996, 0.5)] == [
        "100%",
        "99.99%",
        "99.60%",
        "50%",
    ]


def test_results_are_compared_with_the_first() -> None:
    found = {row.name: row for row in rows([VIEW, View(result(2.0), "b")])}
    assert found["TTFT p50"].texts == ("1.06 s", "2.12 s")
    assert found["TTFT p50"].changes == (0.0, pytest.approx(1.0))
    assert found["TTFT p50"].better == (None, False)
    assert found["goodput, per second"].better == (None, False)
    assert found["requests"].better == (None, None)
    assert [change_text(c) for c in (None, 0.0, -0.1, 0.5, 16.0)] == [
        "",
        "=",
        "-10.0%",
        "+50.0%",
        "×17.0",
    ]


def test_the_commands_write_pages_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    one, two, page = tmp_path / "one.json", tmp_path / "two.json.gz", tmp_path / "page.html"
    write_result(result(), one)
    write_result(result(2.0), two)
    main([str(two)])
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "two.html"
    main([str(one), "-o", str(page)])
    assert "Simulation of one" in page.read_text()
    capsys.readouterr()
    main(["compare", str(one), str(two), "-o", str(page)])
    assert re.search(r"TTFT p50 +1.06 s +2.12 s +\+100", capsys.readouterr().out)
    assert "one against two" in page.read_text()
    main(["compare", str(one), str(two), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["results"] == ["one", "two"]
    assert told["figures"]["TTFT p50"]["changes"] == [0.0, pytest.approx(1.0)]
    with pytest.raises(SystemExit, match="missing"):
        main([str(tmp_path / "missing.json")])
    with pytest.raises(SystemExit, match="nowhere"):
        main([str(one), "-o", str(tmp_path / "nowhere" / "a.html")])
