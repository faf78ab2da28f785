"""The report as one HTML file: no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources

from sim.report import compare, figures, words
from sim.report.figures import Figure
from sim.report.scales import number, seconds
from sim.report.view import View

_NOTE = (
    f'<p class="note">An SLO holds here when {words.ENOUGH:.0%} of all requests meet it; one that '
    "was not answered does not.</p>"
)


def report(view: View) -> str:
    """Of one result."""
    views = (view,)
    drawn = [
        figures.ttft(views),
        figures.tbt(views),
        figures.goodput(views),
        figures.waits(view),
        figures.queues(views),
        figures.running(views),
        figures.hits(views),
        figures.load(view),
        figures.kv(view),
        figures.transfers(views),
        figures.predictions(views),
    ]
    title = f"Simulation of {view.label}"
    head = [*_summary(view), *_cards(view), _outcomes(view)]
    return _page(title, [*head, _grid(drawn), *_events(view), *_details(view)])


def comparison(views: Sequence[View]) -> str:
    """Of several results; the others are compared with the first one."""
    drawn = [
        draw(views)
        for draw in (figures.ttft, figures.tbt, figures.goodput, figures.hits, figures.queues)
    ]
    names = [view.label for view in views]
    summaries = [
        f"<h2>{escape(view.label)}</h2><p>{escape(words.fleet(view))} "
        f"{escape(words.asked(view))}</p>{_verdicts(view)}"
        for view in views
    ]
    differing = [(key, *values) for key, values in compare.differences(views)]
    return _page(
        " against ".join(names),
        [
            *summaries,
            _NOTE,
            "<h2>What was different</h2>",
            _table([("", *names), *differing]) if differing else "<p>Nothing.</p>",
            f"<h2>Figures</h2><p>Changes are against {escape(names[0])}.</p>",
            _compared(views),
            _grid(drawn),
        ],
    )


def _summary(view: View) -> Iterator[str]:
    yield f"<p>{escape(words.fleet(view))} {escape(words.asked(view))}</p>"
    yield f'<p class="headline">{escape(words.headline(view))}</p>'
    yield _verdicts(view)
    yield _NOTE


def _verdicts(view: View) -> str:
    items = "".join(
        f'<li class="{"good" if holds else "bad"}"><span aria-hidden="true">'
        f"{'✓' if holds else '✗'}</span> {escape(text)}</li>"
        for holds, text in words.verdicts(view)
    )
    return f'<ul class="verdicts">{items}</ul>'


def _cards(view: View) -> Iterator[str]:
    totals = view.result.totals
    middle = {key: (totals.get(key) or {}).get("p50") for key in ("ttft_s", "tbt_mean_s")}
    cards = [
        ("requests", number(len(view.result.records))),
        ("goodput", f"{number(totals.get('goodput_per_s', 0.0))} / s"),
        ("median TTFT", "–" if middle["ttft_s"] is None else seconds(middle["ttft_s"])),
        ("median TPOT", "–" if middle["tbt_mean_s"] is None else seconds(middle["tbt_mean_s"])),
        ("prompt tokens from caches", f"{totals.get('cached_share', 0.0):.1%}"),
        ("answer tokens", f"{number(totals.get('output_tokens_per_s', 0.0))} / s"),
    ]
    yield '<dl class="cards">'
    yield from (f"<div><dt>{escape(name)}</dt><dd>{text}</dd></div>" for name, text in cards)
    yield "</dl>"


def _outcomes(view: View) -> str:
    total = max(1, len(view.result.records))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{count:,}</td><td>{count / total:.1%}</td>'
        f'<td class="bar"><span class="{"good" if number == 0 else "bad"}" '
        f'style="width:{count / total:.2%}"></span></td></tr>'
        for number, (name, count) in enumerate(view.outcomes())
    )
    return (
        '<h2 id="outcomes">What became of the requests</h2>'
        f'<div class="scroll" tabindex="0"><table class="outcomes">{body}</table></div>'
    )


def _grid(drawn: Sequence[Figure]) -> str:
    return f'<div class="grid">{"".join(map(_figure, drawn))}</div>'


def _figure(figure: Figure) -> str:
    numbers = (
        f"<details><summary>Numbers</summary>{_table(figure.rows)}</details>" if figure.rows else ""
    )
    return (
        f"<figure><h2>{escape(figure.title)}</h2>"
        f"<figcaption>{escape(figure.how)}</figcaption>{figure.plot}{numbers}</figure>"
    )


def _events(view: View) -> Iterator[str]:
    events = view.result.events
    if not len(events):
        return
    texts = events.texts("text")
    rows = [
        (seconds(at_s), texts[number])
        for at_s, number in zip(events.column("at_s").tolist(), events.column("text"), strict=True)
    ]
    yield f"<h2>What happened</h2>{_table([('at', ''), *rows])}"


def _details(view: View) -> Iterator[str]:
    for title, body in (
        ("What was simulated", view.result.spec),
        ("What was asked", view.result.workload),
    ):
        rows = [(str(key), str(value)) for key, value in body.items()]
        yield f"<h2>{title}</h2>{_table([('', 'value'), *rows])}"


def _compared(views: Sequence[View]) -> str:
    names = [view.label for view in views]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = []
    for row in compare.rows(views):
        cells: list[str] = []
        for text, change, better in zip(row.texts, row.changes, row.better, strict=True):
            kind = {True: "good", False: "bad", None: ""}[better]
            shown = compare.change_text(change) if cells else ""
            cells.append(f'<td>{escape(text)} <small class="{kind}">{shown}</small></td>')
        body.append(f'<tr><th scope="row">{escape(row.name)}</th>{"".join(cells)}</tr>')
    return (
        '<div class="scroll" tabindex="0"><table>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row are the columns' names, the first column those of the rows."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows[1:]
    )
    return (
        '<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _page(title: str, body: Sequence[str]) -> str:
    style = resources.files("sim.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · baton sim</title><style>{style}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{''.join(body)}</main></body></html>\n"
    )
