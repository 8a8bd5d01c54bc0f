"""A figure a step left in its record, as a plotly figure.

A step describes its figure by one of five kinds of plain data; it never imports plotly, and the
report never knows which method drew what. `draw` answers with the JSON form of a plotly figure
(``plotly.graph_objects.Figure(draw(spec))`` for a notebook), `describe` with one line of text for
those who cannot see it. Colours are left to the page, so that charts follow light and dark.

All text in a figure comes from data and is hostile: plotly reads ``<b>``, ``<a href>`` and ``<br>``
in labels, so every string is escaped before plotly sees it.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from html import escape
from typing import Any, Literal, NotRequired, TypedDict

from residency.report import formats as fmt
from residency.report.formats import mappings, number, sequence


class Series(TypedDict):
    """One line of a lines figure."""

    name: str
    x: list[float] | list[str]
    y: list[float | None]


class _Named(TypedDict, total=False):
    note: str
    xlabel: str
    ylabel: str


class LinesSpec(_Named):
    """Curves: losses, learning rates, budgets."""

    kind: Literal["lines"]
    title: str
    series: list[Series]


class _BarsOptions(_Named, total=False):
    group: list[str]


class BarsSpec(_BarsOptions):
    """One bar per label, side by side where ``group`` names several."""

    kind: Literal["bars"]
    title: str
    x: list[Any]
    y: list[float]


class _ScatterOptions(_Named, total=False):
    group: list[str]
    hover: list[str]


class ScatterSpec(_ScatterOptions):
    """A map of points, up to some five thousand; ``hover`` is what each of them is."""

    kind: Literal["scatter"]
    title: str
    x: list[float]
    y: list[float]


class HeatmapSpec(_Named):
    """A matrix, its first row on top."""

    kind: Literal["heatmap"]
    title: str
    x: list[Any]
    y: list[Any]
    z: list[list[float | None]]
    range: NotRequired[list[float]]
    """The two ends of the colour scale, so that two maps can be compared."""


class _TableOptions(TypedDict, total=False):
    note: str


class TableSpec(_TableOptions):
    """Rows of any length of text and numbers."""

    kind: Literal["table"]
    title: str
    columns: list[str]
    rows: list[list[Any]]


class GalleryItem(TypedDict):
    """One picture with what is said of it; ``image`` is a data: URI, or empty."""

    image: str
    title: str
    text: str


class _GalleryOptions(TypedDict, total=False):
    note: str


class GallerySpec(_GalleryOptions):
    """Small pictures, each with a title and a line of text."""

    kind: Literal["gallery"]
    title: str
    items: list[GalleryItem]


FigureSpec = LinesSpec | BarsSpec | ScatterSpec | HeatmapSpec | TableSpec | GallerySpec
LABEL = 32
CHARTS = ("lines", "bars", "scatter", "heatmap")


def draw(spec: dict[str, Any] | FigureSpec) -> dict[str, Any]:
    """The plotly figure of a chart: ``{"data": [...], "layout": {...}}``, all of it plain JSON.

    Raises:
        ValueError: The kind is none of `CHARTS`, or there is nothing in it to draw.
    """
    found: dict[str, Any] = dict(spec)
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": label(found.get("xlabel"))}},
        "yaxis": {"title": {"text": label(found.get("ylabel"))}},
        "showlegend": False,
    }
    makers = {"lines": _lines, "bars": _bars, "scatter": _scatter, "heatmap": _heatmap}
    kind = str(found.get("kind"))
    if kind not in makers:
        raise ValueError(f"cannot draw this figure kind: {kind}")
    data = makers[kind](found, layout)
    if not data:
        raise ValueError("there is nothing in this figure to draw")
    return {"data": data, "layout": layout}


def label(text: Any, width: int = 0, limit: int = 400) -> str:
    """Text that plotly will show as it is; wrapped at ``width`` characters where one is given."""
    found = fmt.clip(text, limit)
    if not width:
        return escape(found, quote=False)
    lines = [part for line in found.splitlines() for part in textwrap.wrap(line, width)]
    return "<br>".join(escape(part, quote=False) for part in lines)


def _lines(spec: dict[str, Any], layout: dict[str, Any]) -> list[dict[str, Any]]:
    series = mappings(spec, "series")
    layout["showlegend"] = len(series) > 1
    layout["hovermode"] = "x unified"
    data = []
    for entry in series:
        x, y = _coordinates(sequence(entry, "x")), [number(v) for v in sequence(entry, "y")]
        x = x or list(range(len(y)))
        if any(isinstance(v, str) for v in x):
            layout["xaxis"]["type"] = "category"
        mode = "lines+markers" if len(y) <= 40 else "lines"
        name = label(entry.get("name"), limit=60)
        data.append({"type": "scatter", "mode": mode, "name": name, "x": x, "y": y})
    return data


def _bars(spec: dict[str, Any], layout: dict[str, Any]) -> list[dict[str, Any]]:
    x, y = sequence(spec, "x"), [number(v) for v in sequence(spec, "y")]
    total = min(len(x), len(y))
    places = {label(fmt.plain(entry), limit=LABEL): None for entry in x[:total]}
    # Where no label has bars of two groups, a group is a colour and every bar keeps its full width.
    layout["barmode"] = "overlay" if len(places) == total else "group"
    layout["xaxis"] |= {"categoryorder": "array", "categoryarray": list(places)}
    data = []
    for name, members in _groups(spec, total):
        ticks, labels = _ticks([x[i] for i in members])
        if ticks != labels:
            layout["xaxis"].update(tickvals=ticks, ticktext=labels)
        else:
            layout["xaxis"]["type"] = "category"
        data.append({"type": "bar", "name": name, "x": ticks, "y": [y[i] for i in members]})
    layout["showlegend"] = len(data) > 1
    return data


def _scatter(spec: dict[str, Any], layout: dict[str, Any]) -> list[dict[str, Any]]:
    x, y = _coordinates(sequence(spec, "x")), _coordinates(sequence(spec, "y"))
    hover = sequence(spec, "hover")
    total = min(len(x), len(y))
    layout["hovermode"] = "closest"
    marker = {
        "size": 9 if total <= 100 else 6 if total <= 1000 else 4,
        "opacity": 0.9 if total <= 100 else 0.7,
    }
    data = []
    for name, members in _groups(spec, total):
        trace: dict[str, Any] = {"type": "scatter", "mode": "markers", "name": name}
        trace |= {"x": [x[i] for i in members], "y": [y[i] for i in members], "marker": marker}
        if hover:
            texts = [label(hover[i], 52, 320) if i < len(hover) else "" for i in members]
            trace |= {"hovertext": texts, "hoverinfo": "text+name" if name else "text"}
        data.append(trace)
    layout["showlegend"] = len(data) > 1
    return data


def _heatmap(spec: dict[str, Any], layout: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [row if isinstance(row, list | tuple) else [] for row in sequence(spec, "z")]
    if not any(rows):
        return []
    trace: dict[str, Any] = {"type": "heatmap", "z": [[number(v) for v in row] for row in rows]}
    for axis, length in (("x", max(map(len, rows))), ("y", len(rows))):
        labels = sequence(spec, axis)
        if len(labels) != length:
            continue
        ticks, texts = _ticks(labels)
        trace[axis] = ticks
        if ticks != texts:
            layout[f"{axis}axis"].update(tickvals=ticks, ticktext=texts)
        else:
            layout[f"{axis}axis"]["type"] = "category"
    layout["yaxis"]["autorange"] = "reversed"
    ends = [number(end) for end in sequence(spec, "range")]
    if len(ends) == 2 and None not in ends:
        trace["zmin"], trace["zmax"] = ends
    cells = [value for row in trace["z"] for value in row]
    if len(cells) <= 225 and all(value is not None and value.is_integer() for value in cells):
        trace["texttemplate"] = "%{z}"  # a confusion matrix is read, not looked at
    return [trace]


def _groups(spec: dict[str, Any], total: int) -> list[tuple[str, list[int]]]:
    """The members of each group, groups in order of appearance; one nameless group if none."""
    group = sequence(spec, "group")
    members: dict[str, list[int]] = {}
    for i in range(total):
        members.setdefault(fmt.plain(group[i]) if i < len(group) else "", []).append(i)
    return [(label(name, limit=60), found) for name, found in members.items()]


def _ticks(labels: list[Any]) -> tuple[list[Any], list[str]]:
    """Where labelled things stand and what is written there: positions where labels repeat."""
    texts = [label(fmt.plain(entry), limit=LABEL) for entry in labels]
    return (list(texts) if len(set(texts)) == len(texts) else list(range(len(texts)))), texts


def _coordinates(values: Iterable[Any]) -> list[Any]:
    return [label(v, limit=60) if isinstance(v, str) else number(v) for v in values]


def describe(spec: dict[str, Any]) -> str:
    """A chart in one line of text: what the Markdown twin and a screen reader get."""
    kind = spec.get("kind")
    if kind == "lines":
        parts = []
        for entry in mappings(spec, "series"):
            y = [v for v in map(number, sequence(entry, "y")) if v is not None]
            if y:
                ends = f"{fmt.plain(y[0])} → {fmt.plain(y[-1])}"
                parts.append(f"{fmt.plain(entry.get('name'))} {ends} over {len(y)} points")
        return "; ".join(parts)
    if kind == "bars":
        pairs = list(zip(sequence(spec, "x"), sequence(spec, "y"), strict=False))
        shown = "; ".join(f"{fmt.plain(x)} {fmt.plain(y)}" for x, y in pairs[:12])
        return shown + (f"; and {len(pairs) - 12} more" if len(pairs) > 12 else "")
    if kind == "scatter":
        total = min(len(sequence(spec, "x")), len(sequence(spec, "y")))
        counts = Counter(fmt.plain(g) for g in sequence(spec, "group")[:total])
        return f"{total:,} points" + "".join(f"; {n:,} {name}" for name, n in counts.items())
    if kind == "heatmap":
        cells = [number(v) for row in sequence(spec, "z") if isinstance(row, list) for v in row]
        known = [v for v in cells if v is not None]
        size = f"{len(sequence(spec, 'z'))} rows, {len(cells):,} cells"
        return f"{size}, from {fmt.plain(min(known))} to {fmt.plain(max(known))}" if known else size
    return ""
