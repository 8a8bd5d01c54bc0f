"""Quality against what it costs: one chart whose cost axis the reader chooses."""

from __future__ import annotations

from typing import Any

from residency.report import figures
from residency.report import formats as fmt
from residency.report.facts import Facts, Stage
from residency.report.formats import dig, mapping, number

# (button, axis title, path in an exam, whether it is bytes)
AXES = (
    ("Tokens/s", "tokens per second", ("measured", "tokens_per_second"), False),
    ("Size on disk", "bytes on disk", ("cost", "bytes_on_disk"), True),
    ("Peak memory", "peak memory", ("measured", "peak_memory_bytes"), True),
    ("KV cache", "KV cache per token", ("cost", "kv_bytes_per_token"), True),
)


def tradeoff(facts: Facts) -> list[dict[str, Any]]:
    """One plotly figure per cost that at least one exam knows.

    Returns:
        ``[{"label": button text, "data": [...], "layout": {...}, "text": one line}, ...]``
    """
    found = []
    for name, title, path, is_bytes in AXES:
        points = [
            (stage, cost, stage.score)
            for stage in facts.stages
            if (cost := number(dig(stage.exam, *path))) is not None and stage.score is not None
        ]
        if points:
            found.append({"label": name, **_figure(facts, points, title, is_bytes)})
    return found


def _figure(facts: Facts, points: list[tuple[Stage, float, float]], title: str, is_bytes: bool) -> dict[str, Any]:
    scale, unit = _unit(max(x for _, x, _ in points)) if is_bytes else (1.0, "")
    xs = [x / scale for _, x, _ in points]
    ys = [y for _, _, y in points]
    labels = [figures.label(stage.label, limit=26) for stage, _, _ in points]
    ups, downs = zip(*(_whiskers(stage) for stage, _, _ in points), strict=True)
    write = fmt.size if is_bytes else fmt.measure
    hover = [
        f"<b>{figures.label(s.label)}</b><br>score {s.cells['score']} ({s.cells['score_span']})<br>{title} {write(x)}"
        for s, x, _ in points
    ]
    low, high = _room(xs, 0.12)
    bottom, top = _room(
        [y - (d or 0) for y, d in zip(ys, downs, strict=True)] + [y + (u or 0) for y, u in zip(ys, ups, strict=True)],
        0.06,
    )
    sizes = [15 if stage.role == "specialist" else 11 for stage, _, _ in points]
    symbols = ["circle-open" if stage.role == "base" else "circle" for stage, _, _ in points]
    path = {
        "type": "scatter",
        "mode": "lines",
        "x": xs,
        "y": ys,
        "line": {"color": "var(--line-strong)", "dash": "dot", "width": 1.5},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    marks = {
        "type": "scatter",
        "mode": "markers+text",
        "x": xs,
        "y": ys,
        "text": labels,
        "textposition": _places(xs, ys, (high - low), (top - bottom)),
        "hovertext": hover,
        "hoverinfo": "text",
        "cliponaxis": False,
        "marker": {
            "size": sizes,
            "symbol": symbols,
            "opacity": 1,
            "color": "var(--accent)",
            "line": {"width": 2, "color": "var(--accent)"},
        },
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": list(ups),
            "arrayminus": list(downs),
            "color": "var(--whisker)",
            "thickness": 1.5,
            "width": 5,
        },
        "showlegend": False,
    }
    metric = str(dig(facts.record, "task", "metric", default="task score"))
    better = "" if facts.scale.higher else " (lower is better)"
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": f"{title} ({unit})" if unit else title}, "range": [low, high]},
        "yaxis": {"title": {"text": figures.label(metric) + better}, "range": [bottom, top]},
        "hovermode": "closest",
        "showlegend": False,
    }
    chance = number(mapping(facts.record, "task").get("chance"))
    if chance is not None and bottom <= chance <= top:
        layout["shapes"] = [_chance_line(chance)]
    text = "; ".join(f"{s.label} {s.cells['score']} at {write(x)}" for s, x, _ in points)
    return {"data": [path, marks], "layout": layout, "text": text}


def _unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= scale:
            return scale, unit
    return 1.0, "B"


def _whiskers(stage: Stage) -> tuple[float | None, float | None]:
    """How far the interval reaches above and below the score."""
    low, high = number(dig(stage.exam, "task", "low")), number(dig(stage.exam, "task", "high"))
    if low is None or high is None or stage.score is None:
        return None, None
    return max(0.0, high - stage.score), max(0.0, stage.score - low)


def _room(values: list[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * share or abs(high) * share or 1.0
    return low - margin, high + margin


def _places(xs: list[float], ys: list[float], width: float, height: float) -> list[str]:
    """Where each label goes: away from the nearer edge, up or down where neighbours are close."""
    middle = (min(xs) + max(xs)) / 2
    places = []
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        near = [
            (ys[j], -j)  # of two that are equal, the earlier one stands above
            for j in range(len(xs))
            if j != i and abs(xs[j] - x) < 0.3 * width and abs(ys[j] - y) < 0.07 * height
        ]
        above, below = sum(v > (y, -i) for v in near), sum(v < (y, -i) for v in near)
        row = "middle" if above == below else "bottom" if above > below else "top"
        places.append(f"{row} {'left' if x > middle else 'right'}")
    return places


def _chance_line(value: float) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": value,
        "y1": value,
        "line": {"color": "var(--loss)", "dash": "dash", "width": 1},
        "label": {"text": "chance", "textposition": "end", "font": {"color": "var(--loss)"}},
    }
