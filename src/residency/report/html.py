"""run.json as one page that opens offline: a pure function of the record.

The page carries plotly.js, its data and its styles in itself and asks the network for nothing; a
Content-Security-Policy in its head holds it to that. Scripts are admitted by their hash, so text
from data that slipped through the escaping still could not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from residency.report import figures, outcome, sections
from residency.report import formats as fmt
from residency.report.facts import COLUMNS, Facts, Stage
from residency.report.groups import by_tag
from residency.report.items import flips, strip
from residency.report.tradeoff import tradeoff

if TYPE_CHECKING:
    import jinja2

SHOWN_ROWS = 200
LONG_TEXT = 1500
_HASH = re.compile(r"[0-9a-f]{32,}")

# Each colour in light and in dark; tests hold the text colours to a contrast of 4.5 on the paper.
PALETTE = {
    "paper": ("#fbfaf7", "#14171a"),
    "card": ("#ffffff", "#1b1f23"),
    "ink": ("#1d2127", "#e8e6e1"),
    "muted": ("#5b6470", "#a0a8b1"),
    "line": ("#e4e0d8", "#2c3238"),
    "line-strong": ("#b9b3a7", "#58616a"),
    "whisker": ("#8b8f94", "#7d868e"),
    "accent": ("#0f6b6b", "#62c7bc"),
    "gain": ("#1b7546", "#6fcf97"),
    "loss": ("#ad3327", "#f08a7d"),
    "wash": ("#f1efe9", "#22272c"),
    "cool": ("#eef5f4", "#16302f"),
    "part": ("#c4a24a", "#b08f3c"),
    "c1": ("#0f6b6b", "#62c7bc"),
    "c2": ("#c4781b", "#f0b35a"),
    "c3": ("#5b5ea6", "#a5a8f0"),
    "c4": ("#ad3327", "#f08a7d"),
    "c5": ("#4f7f2f", "#9ccc6c"),
    "c6": ("#8a5a83", "#d6a0cd"),
    "c7": ("#2f78b7", "#7fbcf0"),
    "c8": ("#77736a", "#b8b3a8"),
}


def render_html(record: dict[str, Any]) -> str:
    """Draw a run's record as one self-contained HTML page.

    Args:
        record: What ``run.json`` holds, in any state: running, failed, with keys missing. It is
            not changed, and the same record always gives the same bytes.

    Returns:
        The page. Every text of the record is escaped; no request leaves the page.
    """
    from markupsafe import Markup

    environment = _environment()
    scripts = {"plotly": _plotly(), "page": _asset(environment, "report.js")}
    hashes = " ".join(f"'sha256-{_digest(source)}'" for source in scripts.values())
    book = _Book()
    page = environment.get_template("page.html.j2").render(
        **_context(Facts(record), book),
        book=book,
        csp="default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src {hashes}; base-uri 'none'; form-action 'none'",
        style=Markup(_palette() + _asset(environment, "report.css")),
        scripts={name: Markup(source) for name, source in scripts.items()},
        payload=lambda: Markup(_json({"charts": book.charts, "tables": book.tables})),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("residency.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.tests["hash"] = lambda text: bool(_HASH.fullmatch(text))
    environment.filters["clip"] = lambda text: fmt.clip(text, LONG_TEXT)
    return environment


class _Book:
    """The charts and long tables met while the page is drawn, for its script to draw again."""

    def __init__(self) -> None:
        self.charts: list[dict[str, Any]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._seen = 0

    def add(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Turn a figure spec into what the template shows; never raises for a bad one."""
        self._seen += 1
        block = {
            "id": f"figure-{self._seen}",
            "title": str(fmt.dig(spec, "title", default="Untitled")),
            "note": str(fmt.dig(spec, "note", default="")),
        }
        try:
            if spec.get("kind") == "table":
                return block | self._table(block["id"], spec)
            if spec.get("kind") == "gallery":
                return block | {"kind": "gallery", "pictures": sections.gallery(spec)}
            drawing = figures.draw(spec)
            text = figures.describe(spec)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else "its data is malformed"
            return block | {"kind": "none", "reason": reason}
        return block | self.chart(block["id"], [drawing], text)

    def chart(self, identity: str, variants: list[dict[str, Any]], text: str) -> dict[str, Any]:
        """Register a chart of one or more variants."""
        self.charts.append({"id": identity, "variants": variants})
        return {"id": identity, "kind": "chart", "text": text}

    def _table(self, identity: str, spec: dict[str, Any]) -> dict[str, Any]:
        rows = [
            [fmt.plain(cell) for cell in (row if isinstance(row, list | tuple) else [row])]
            for row in fmt.sequence(spec, "rows")
        ]
        if len(rows) > 10:
            self.tables[identity] = rows
        columns = [str(name) for name in fmt.sequence(spec, "columns")]
        table = sections.Table(columns, rows[:SHOWN_ROWS])
        return {"kind": "table", "table": table, "total": len(rows)}


def _context(facts: Facts, book: _Book) -> dict[str, Any]:
    trade = tradeoff(facts)
    final = facts.final
    groups = by_tag(facts)
    guard_flips = [flips(facts, s.guard_change, guard=True) for s in facts.stages]
    return {
        "facts": facts,
        "description": str(fmt.dig(facts.record, "description", default="")),
        "sentence": outcome.sentence(facts).replace(" %", "\u00a0%"),
        "subtitle": outcome.subtitle(facts),
        "tiles": outcome.tiles(facts),
        "banner": outcome.banner(facts),
        "columns": COLUMNS,
        "forest": _forest(facts),
        "trade": trade,
        "trade_chart": book.chart("tradeoff", trade, "; ".join(v["text"] for v in trade[:1])) if trade else None,
        "groups": book.add(groups) if groups else None,
        "steps": sections.step_views(facts),
        "total": flips(facts, final.change) if final else None,
        "strip": strip(facts),
        "guard": sections.guard_table(facts),
        "guard_name": str(fmt.dig(facts.record, "guard", "name", default="guard")),
        "guard_strip": strip(facts, "guard"),
        "guard_flips": [found for found in guard_flips if found and any(found.counts)],
        "extras": sections.extras_table(facts),
        "data": sections.data_table(facts),
        "quarantine": sections.quarantine_table(facts),
        "recipe": sections.recipe(facts),
        "provenance": sections.provenance(facts),
        "dash": fmt.NONE,
    }


def _forest(facts: Facts) -> dict[str, dict[str, float]]:
    """Each stage's score and interval as positions between 0 and 100 on one common scale."""
    known: dict[str, tuple[float, float, float]] = {}
    for stage in facts.stages:
        bounds = [fmt.number(fmt.dig(stage.exam, "task", key)) for key in ("low", "value", "high")]
        numbers = [bound for bound in bounds if bound is not None]
        if len(numbers) == 3:
            known[stage.id] = (numbers[0], numbers[1], numbers[2])
    if not known:
        return {}
    start, end = min(low for low, _, _ in known.values()), max(high for _, _, high in known.values())
    reach = (end - start) or 1.0

    def place(value: float) -> float:
        return round(4 + 92 * (value - start) / reach, 2)

    base: Stage | None = facts.base
    mark = place(known[base.id][1]) if base and base.id in known else 4.0
    return {
        identity: {"low": place(low), "at": place(value), "high": place(high), "base": mark}
        for identity, (low, value, high) in known.items()
    }


def _asset(environment: jinja2.Environment, name: str) -> str:
    """A style sheet or script, as it is: read by the loader, never rendered."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("\r\n", "\n")


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _palette() -> str:
    def block(shade: int) -> str:
        return "".join(f"--{name}:{pair[shade]};" for name, pair in PALETTE.items())

    light, dark = f"color-scheme:light;{block(0)}", f"color-scheme:dark;{block(1)}"
    return (
        f":root{{{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f":root[data-theme=dark]{{{dark}}}\n"
    )


def _json(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can close one."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
