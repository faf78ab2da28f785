"""The Grafana dashboard, `deploy/grafana/baton.json`: `python -m tools.dashboard` writes it.

Made from rows of panels, because hundreds of lines of JSON can hardly be reviewed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.dashboard.panel import Panel
from tools.dashboard.rows import ROWS

FILE = Path(__file__).parents[2] / "deploy/helm/baton/files/dashboard.json"
SELECTOR = 'cluster=~"$cluster",namespace=~"$namespace"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # of Grafana's grid


def dashboard() -> dict[str, Any]:
    return {
        "uid": "baton-overview",
        "title": "baton",
        "description": "Disaggregated LLM serving: goodput, latency, engines, KV, failures.",
        "tags": ["baton", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _label("cluster"), _label("namespace")]},
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    numbers = itertools.count(1)
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        yield {
            "id": next(numbers),
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": place,
            "panels": [],
        }
        y += 1
        x = 0
        height = 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            height = 4 if panel.kind == "stat" else 8
            yield _panel(panel, next(numbers), {"x": x, "y": y, "w": panel.width, "h": height})
            x += panel.width
        y += height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    look = {"fillOpacity": 20 if panel.stacked else 5, "showPoints": "never"}
    custom = look | ({"stacking": {"mode": "normal"}} if panel.stacked else {})
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        defaults["custom"] = custom
    if panel.most is not None:
        defaults["max"] = panel.most
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.what,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {
                "refId": letter,
                "datasource": SOURCE,
                "expr": expression.replace("@", SELECTOR),
                "legendFormat": legend,
                "exemplar": "histogram_quantile" in expression,
            }
            for letter, (legend, expression) in zip("ABCDEFGH", panel.queries.items(), strict=False)
        ],
    }


def _source() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
    }


def _label(name: str) -> dict[str, Any]:
    """All, unless one is chosen: also where Prometheus adds no such label."""
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": f"label_values(baton_process_info, {name})", "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
    }


def render() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


def main() -> None:
    FILE.write_text(render())


if __name__ == "__main__":
    main()
