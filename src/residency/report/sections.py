"""The tables below the first screen, as text: shared by the page and its Markdown twin."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from residency.report import formats as fmt
from residency.report.facts import Facts, Stage
from residency.report.formats import dig, mapping, mappings, plain
from residency.report.items import Flips, flips, picture


@dataclass(frozen=True)
class Table:
    """A small table of text."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class StepView:
    """One step, or the base, as the report shows it."""

    stage: Stage
    ordinal: int  # 0 for the base
    title: str
    tags: list[str]
    summary: list[tuple[str, str]]
    params: list[tuple[str, str]]
    wiring: list[tuple[str, str]]
    figures: list[dict[str, Any]]
    flips: Flips | None


def pairs(value: Any) -> list[tuple[str, str]]:
    """A mapping as (key, text) pairs, nested mappings as dotted keys."""
    found: list[tuple[str, str]] = []
    if not isinstance(value, dict):
        return found
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            found += [(f"{key}.{name}", text) for name, text in pairs(entry)]
        else:
            found.append((str(key), plain(entry)))
    return found


def plainly(value: Any) -> list[tuple[str, str]]:
    """Facts in words: underscores as spaces, bytes in their unit, nothing that is unknown."""
    found = []
    for key, entry in value.items() if isinstance(value, dict) else ():
        words = str(key).split("_")
        if isinstance(entry, dict):
            found += [(f"{' '.join(words)} {name}", text) for name, text in plainly(entry)]
        elif entry is not None:
            is_bytes = "bytes" in words and fmt.number(entry) is not None
            shown = words[:-1] if is_bytes and words[-1] == "bytes" else words
            found.append((" ".join(shown), fmt.size(entry) if is_bytes else plain(entry)))
    return found


def step_views(facts: Facts) -> list[StepView]:
    """Every step of the run, after the base where its exam left figures."""
    shown = [stage for stage in facts.stages if stage.step or mappings(stage.exam, "figures")]
    steps = [stage for stage in shown if stage.step]
    return [_step_view(facts, stage, steps.index(stage) + 1 if stage.step else 0) for stage in shown]


def _step_view(facts: Facts, stage: Stage, ordinal: int) -> StepView:
    step = stage.step
    before = facts.predecessor(stage.id)
    change = facts.change(stage.id, before, exam=stage.exam) if before is not None else None
    memory = dig(step, "measured", "peak_memory_bytes")
    tags = [dig(step, "step"), dig(step, "variant"), dig(step, "method")]
    words = list(dict.fromkeys(str(tag) for tag in tags if tag))
    if facts.reused(step):
        words.append("reused from an earlier run")
    elif dig(step, "status", default="done") != "done":
        words.append(str(step["status"]))
    if stage.cells["step_time"] != fmt.NONE:
        words.append(stage.cells["step_time"])
    if memory is not None:
        words.append(f"peak {fmt.size(memory)}")
    wiring = [
        ("address", plain(step.get("address"))),
        *((f"in · {key}", text) for key, text in pairs(step.get("inputs"))),
        *((f"out · {key}", text) for key, text in pairs(step.get("outputs"))),
    ]
    return StepView(
        stage=stage,
        ordinal=ordinal,
        title=str(dig(step, "title", default=stage.label)),
        tags=words,
        summary=plainly(step.get("summary")),
        params=pairs(step.get("params")),
        wiring=wiring if step else [],
        figures=[
            *mappings(step, "figures"),
            *mappings(step, "measured", "figures"),  # of times, which differ from run to run
            *mappings(stage.exam, "figures"),
        ],
        flips=flips(facts, change),
    )


def gallery(spec: dict[str, Any]) -> list[dict[str, str]]:
    """The pictures of a gallery figure, each with its title and text; only those the page can carry in itself.

    Raises:
        ValueError: When there is none.
    """
    found = [
        {"image": picture(entry.get("image")), "title": plain(entry.get("title")), "text": plain(entry.get("text"))}
        for entry in mappings(spec, "items")[:PICTURES]
    ]
    if not found:
        raise ValueError("there is nothing in this figure to draw")
    return found


PICTURES = 48
"""Of a gallery; a page is no archive."""


def guard_table(facts: Facts) -> Table | None:
    """The guard score of every exam that has one."""
    rows = []
    for stage in facts.stages:
        if stage.cells["guard"] == fmt.NONE:
            continue
        change = stage.guard_change
        moved = [fmt.NONE] * 3
        if change is not None:
            verdict = f"{change.symbol} {change.words}"
            moved = [change.text, change.span, verdict]
        n = plain(dig(stage.exam, "guard", "n"))
        rows.append([stage.label, stage.cells["guard"], stage.cells["guard_span"], n, *moved])
    heads = ["Stage", "Guard", "95 % interval", "Items", "Against base", "Interval", "Excludes zero?"]
    return Table(heads, rows) if rows else None


def extras_table(facts: Facts) -> Table | None:
    """Whatever else the exams measured."""
    names = list(dict.fromkeys(n for exam in facts.exams for n in mapping(exam, "extra")))
    rows = []
    for name in names:
        known = [mapping(exam, "extra", name) for exam in facts.exams]
        scale = fmt.Scale.of({"unit": name}, [k.get("value") for k in known])
        better = next((k["higher_is_better"] for k in known if "higher_is_better" in k), None)
        sense = "" if better is None else " (higher is better)" if better else " (lower is better)"
        row = [f"{name}{sense}"]
        for entry in known:
            span = scale.span(entry.get("low"), entry.get("high"))
            text = scale.text(entry.get("value"))
            row.append(text if span == fmt.NONE else f"{text} ({span})")
        rows.append(row)
    heads = ["Measure", *(facts.label(str(exam.get("id"))) for exam in facts.exams)]
    return Table(heads, rows) if rows else None


def data_table(facts: Facts) -> Table | None:
    """What went in: rows, refusals and fingerprints."""
    keys = ("source", "rows", "refused", "duplicates", "sha256")
    rows = [
        [str(name), *(plain(entry.get(key)) for key in keys)]
        for name, entry in mapping(facts.record, "data").items()
        if isinstance(entry, dict)
    ]
    heads = ["Data", "Source", "Rows", "Refused", "Duplicates", "sha256"]
    return Table(heads, rows) if rows else None


def quarantine_table(facts: Facts) -> tuple[int, Table | None]:
    """How many rows were refused, and a sample of them."""
    sample = mappings(facts.record, "quarantine", "sample")
    total = fmt.number(dig(facts.record, "quarantine", "count"))
    rows = [[fmt.clip(plain(entry.get(key)), 300) for key in ("source", "line", "reason", "text")] for entry in sample]
    table = Table(["Source", "Line", "Reason", "Text"], rows) if rows else None
    return int(total if total is not None else len(rows)), table


def provenance(facts: Facts) -> list[tuple[str, list[tuple[str, str]]]]:
    """What it would take to do this run again: base, versions, machine, seed, determinism."""
    record = facts.record
    run = [
        ("started", fmt.moment(dig(record, "time", "started"))),
        ("finished", fmt.moment(dig(record, "time", "finished"))),
        ("took", fmt.duration(dig(record, "time", "seconds"))),
        ("seed", plain(record.get("seed"))),
        ("determinism", plain(record.get("determinism"))),
    ]
    found = [
        ("Run", [pair for pair in run if pair[1] != fmt.NONE]),
        ("Base", plainly(record.get("base"))),
        ("Machine", plainly(dig(record, "machine", "measured"))),
        ("Versions", pairs(record.get("versions"))),
    ]
    return [(name, entries) for name, entries in found if entries]


def recipe(facts: Facts) -> tuple[str, str, str]:
    """(file, text as written, resolved form as JSON) of the recipe; empty where missing."""
    entry = mapping(facts.record, "recipe")
    resolved = mapping(entry, "resolved")
    shown = json.dumps(resolved, indent=2, ensure_ascii=False, default=str) if resolved else ""
    return str(dig(entry, "file", default="recipe")), str(dig(entry, "text", default="")), shown
