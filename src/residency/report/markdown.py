"""The report's Markdown twin: the same content in tables, for a terminal or a code host."""

from __future__ import annotations

from typing import Any

from residency.report import figures, outcome, sections
from residency.report import formats as fmt
from residency.report.facts import Change, Facts
from residency.report.formats import dig
from residency.report.groups import by_tag
from residency.report.items import Flips, flips

TABLE_ROWS = 20
CELL = 160
_HOSTILE = str.maketrans({c: f"\\{c}" for c in "\\|<`["})


def render_markdown(record: dict[str, Any]) -> str:
    """Draw a run's record as Markdown, with charts told in words.

    Args:
        record: What ``run.json`` holds, in any state. It is not changed.

    Returns:
        GitHub-flavoured Markdown, padded so that it reads well unrendered.
    """
    facts = Facts(record)
    parts = [*_opening(facts), *_stages(facts), *_steps(facts), *_items(facts), *_record(facts)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")


def safe(text: Any, limit: int = CELL) -> str:
    """Text of data on one line, unable to open a table cell, a tag, a code span or a link."""
    return " ".join(fmt.clip(" ".join(str(text).split()), limit).translate(_HOSTILE).split())


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A pipe table; cells are made safe and padded to the width of their column."""
    width = max([len(columns), *map(len, rows)])
    lines = [[safe(cell) for cell in [*row, *[""] * (width - len(row))]] for row in [columns, *rows]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(width)]

    def join(cells: list[str]) -> str:
        padded = (cell.ljust(space) for cell, space in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    ruler = join(["-" * space for space in widths])
    return "\n".join([join(lines[0]), ruler, *map(join, lines[1:])])


def fence(text: str, language: str = "") -> str:
    """Text as it is, in a fence longer than any in it."""
    ticks = "```"
    while ticks in text:
        ticks += "`"
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _opening(facts: Facts) -> list[str]:
    found = [f"# {safe(facts.name)}"]
    banner = outcome.banner(facts)
    if banner:
        found.append(f"> **{safe(banner['title'])}.** {safe(banner['text'])}")
        if banner["error"]:
            found.append(fence(banner["error"]))
    if dig(facts.record, "description"):
        found.append(safe(dig(facts.record, "description"), 1000))
    found += [f"**{safe(outcome.sentence(facts), 1000)}**"]
    found += [" · ".join(safe(part) for part in outcome.subtitle(facts))]
    rows = [[t.label, t.value, t.was or fmt.NONE, t.delta] for t in outcome.tiles(facts)]
    if rows:
        found.append(table(["", "Now", "Base", "Change"], rows))
    return found


def _stages(facts: Facts) -> list[str]:
    columns, rows = facts.stage_table()
    return ["## Stages", table(columns, rows) if rows else "No stage has been recorded yet."]


def _steps(facts: Facts) -> list[str]:
    found: list[str] = []
    for view in sections.step_views(facts):
        number = f"{view.ordinal}. " if view.ordinal else ""
        found += [f"### {number}{safe(view.title)}", " · ".join(safe(tag) for tag in view.tags)]
        if view.flips:
            found.append(f"{safe(view.flips.title)}: {_change(view.flips.change)}")
        facts_of = [*view.summary, *((f"set {key}", text) for key, text in view.params)]
        if facts_of:
            found.append(table(["", "Value"], [list(pair) for pair in facts_of]))
        for spec in view.figures:
            found += _figure(spec)
        found += _flips(view.flips)
        if view.wiring:
            found.append(table(["", "Address"], [list(pair) for pair in view.wiring]))
    return ["## Step by step", *found] if found else []


def _figure(spec: dict[str, Any]) -> list[str]:
    title = f"**{safe(dig(spec, 'title', default='Untitled'))}**"
    note = safe(dig(spec, "note", default=""))
    kind = spec.get("kind")
    if kind == "table":
        rows = [
            [fmt.plain(cell) for cell in (row if isinstance(row, list | tuple) else [row])]
            for row in fmt.sequence(spec, "rows")
        ]
        total = f"{len(rows):,} rows"
        if len(rows) > TABLE_ROWS:
            total = f"the first {TABLE_ROWS} of {total}"
        columns = [str(name) for name in fmt.sequence(spec, "columns")]
        return [f"{title} ({total})", table(columns, rows[:TABLE_ROWS]), note]
    if kind == "gallery":
        try:
            shown = sections.gallery(spec)
        except ValueError as error:
            return [f"{title}: {safe(error)}", note]
        rows = [[entry["title"], entry["text"]] for entry in shown[:TABLE_ROWS]]
        return [f"{title} ({len(shown)} pictures)", table(["Picture", ""], rows), note]
    if kind in figures.CHARTS:
        return [f"{title}: {safe(figures.describe(spec), 600) or 'nothing to draw'}", note]
    return [f"{title}: cannot draw this figure kind: {safe(kind)}", note]


def _change(change: Change) -> str:
    span = "" if change.span == fmt.NONE else f" ({change.span})"
    counts = f"; {len(change.fixed)} items fixed, {len(change.broken)} broken"
    return f"{change.text}{span} {change.symbol} {change.words}{counts}"


def _flips(found: Flips | None) -> list[str]:
    parts: list[str] = []
    for name, _, members, more in found.groups if found else []:
        if not found or not members:
            continue
        parts.append(f"{name} {len(members) + more}, {safe(found.title)}:")
        rows = [[f.id, f.prompt, f.answer, f.before, f.after] for f in members]
        parts.append(table(["Item", "Question", "Reference", "Before", "After"], rows))
        if more:
            parts.append(f"{more} more are in run.json.")
    return parts


def _items(facts: Facts) -> list[str]:
    found: list[str] = []
    if facts.final and facts.final.change:
        total = flips(facts, facts.final.change)
        if total:
            found += ["## Item by item", f"{safe(total.title)}: {_change(total.change)}"]
            found += _flips(total)
    if groups := by_tag(facts):
        found += ["## Group by group", *_figure(groups)]
    guard = sections.guard_table(facts)
    if guard:
        name = safe(dig(facts.record, "guard", "name", default="guard"))
        found += [f"## Guard: {name}", table(guard.columns, guard.rows)]
        for stage in facts.stages:
            found += _flips(flips(facts, stage.guard_change, guard=True))
    extras = sections.extras_table(facts)
    if extras:
        found += ["## Also measured", table(extras.columns, extras.rows)]
    return found


def _record(facts: Facts) -> list[str]:
    found: list[str] = []
    data = sections.data_table(facts)
    count, quarantine = sections.quarantine_table(facts)
    if data or count:
        found += ["## Data", table(data.columns, data.rows) if data else ""]
        found.append(f"{count:,} rows in quarantine." if count else "No row was put in quarantine.")
        found.append(table(quarantine.columns, quarantine.rows) if quarantine else "")
    file, text, resolved = sections.recipe(facts)
    if text or resolved:
        found += ["## Recipe", safe(file), fence(text, "yaml") if text else ""]
        if resolved:
            found += ["As it was resolved, defaults filled in:", fence(resolved, "json")]
    rows = [[name, key, value] for name, pairs in sections.provenance(facts) for key, value in pairs]
    return [*found, "## Provenance", table(["", "What", "Value"], rows)] if rows else found
