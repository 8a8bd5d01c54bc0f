"""Two or more runs side by side, as a table that reads in a terminal and on a code host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from residency.report import formats as fmt
from residency.report import outcome, sections
from residency.report.facts import Facts
from residency.report.formats import dig, mapping, mappings, number
from residency.report.markdown import safe, table

# (row, key of a stage's cells)
_CELLS = (
    ("guard", "guard"),
    ("parameters", "parameters"),
    ("on disk", "disk"),
    ("KV per token", "kv"),
    ("tokens/s", "speed"),
    ("first token", "first_token"),
    ("peak memory", "memory"),
)
_SAME = (("test rows", ("data", "test", "sha256")), ("metric", ("task", "metric")))


def render_comparison(records: Sequence[dict[str, Any]]) -> str:
    """Put runs side by side: their last examined stage, and where their recipes differ.

    Where the runs sat the same test, every later run is also compared with the first one item by
    item; where they did not, a warning stands above the scores.

    Args:
        records: Two or more ``run.json`` records. They are not changed.

    Raises:
        ValueError: Fewer than two records.
    """
    if len(records) < 2:
        raise ValueError(f"a comparison needs two runs or more, not {len(records)}")
    runs = [Facts(record) for record in records]
    names = _names(runs)
    same = [_agree(runs, path) for _, path in _SAME]
    parts = ["# " + " · ".join(safe(name) for name in names)]
    parts += [
        f"> **Scores do not compare:** the runs differ in their {what}."
        for (what, _), agree in zip(_SAME, same, strict=True)
        if agree is False
    ]
    parts += [
        f"> {safe(name)}: {safe(found['title'])}. {safe(found['text'])}"
        for name, run in zip(names, runs, strict=True)
        if (found := outcome.banner(run))
    ]
    parts.append(table(["", *names], _rows(runs)))
    if False not in same:
        parts += _paired(runs, names)
    parts += _differences(runs, names)
    text = "\n\n".join(parts) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")


def _names(runs: list[Facts]) -> list[str]:
    """The runs' names, numbered where two are the same."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({i})" for i, name in enumerate(names, start=1)]


def _agree(runs: list[Facts], path: tuple[str, ...]) -> bool | None:
    """Whether the runs agree on an entry; None where one of them does not say."""
    values = [dig(run.record, *path) for run in runs]
    if any(value is None for value in values):
        return None
    return all(value == values[0] for value in values)


def _rows(runs: list[Facts]) -> list[list[str]]:
    rows = [
        ["status", *(run.status for run in runs)],
        ["base", *(str(dig(run.record, "base", "name", default=fmt.NONE)) for run in runs)],
        ["steps", *(" → ".join(str(s.get("step")) for s in run.steps) or fmt.NONE for run in runs)],
        ["metric", *(str(dig(run.record, "task", "metric", default=fmt.NONE)) for run in runs)],
        ["base score", *(_score(run, last=False) for run in runs)],
        ["score", *(_score(run, last=True) for run in runs)],
        ["against base", *(_against_base(run) for run in runs)],
    ]
    for name, key in _CELLS:
        found = [(run.final or run.base) for run in runs]
        rows.append([name, *(stage.cells[key] if stage else fmt.NONE for stage in found)])
    seconds = [dig(run.record, "time", "seconds") for run in runs]
    return [*rows, ["wall time", *(fmt.duration(value) for value in seconds)]]


def _score(run: Facts, *, last: bool) -> str:
    stage = (run.final or run.base) if last else run.base
    if stage is None:
        return fmt.NONE
    span = stage.cells["score_span"]
    return stage.cells["score"] + (f" ({span})" if span != fmt.NONE else "")


def _against_base(run: Facts) -> str:
    change = run.final.change if run.final else None
    if change is None:
        return fmt.NONE
    span = f" ({change.span})" if change.span != fmt.NONE else ""
    return f"{change.text}{span} {change.symbol} {change.words}"


def _paired(runs: list[Facts], names: list[str]) -> list[str]:
    """The last exams of the later runs against the first run's, over the items they share."""
    scores = [_item_scores(run) for run in runs]
    first, scale = scores[0], runs[0].scale
    rows = []
    for name, found in zip(names[1:], scores[1:], strict=True):
        shared = sorted(first.keys() & found.keys())
        if not shared:
            continue
        moves = [found[i] - first[i] for i in shared]
        better = sum((m > 0) if scale.higher else (m < 0) for m in moves)
        worse = sum((m < 0) if scale.higher else (m > 0) for m in moves)
        mean = scale.signed(sum(moves) / len(moves))
        rows.append([name, str(len(shared)), str(better), str(worse), mean])
    if not rows:
        return []
    heads = ["Run", "Shared items", "Better", "Worse", "Mean difference"]
    return [f"Item by item against {safe(names[0])}:", table(heads, rows)]


def _item_scores(run: Facts) -> dict[str, float]:
    stage = run.final or run.base
    found = mappings(stage.exam, "task", "items") if stage else []
    scores = {str(item.get("id")): number(item.get("score")) for item in found}
    return {identity: value for identity, value in scores.items() if value is not None}


def _differences(runs: list[Facts], names: list[str]) -> list[str]:
    """The settings of the resolved recipes that are not the same everywhere."""
    settings = [dict(_flat(mapping(run.record, "recipe", "resolved"))) for run in runs]
    for run, found in zip(runs, settings, strict=True):
        found.pop("name", None)
        found["seed"] = fmt.plain(run.record.get("seed"))
    keys = dict.fromkeys(key for found in settings for key in found)
    rows = [
        [key, *(found.get(key, fmt.NONE) for found in settings)]
        for key in keys
        if len({found.get(key, fmt.NONE) for found in settings}) > 1
    ]
    if not rows:
        return ["The recipes do not differ."]
    return ["Where the recipes differ:", table(["Setting", *names], rows)]


def _flat(value: Any) -> list[tuple[str, str]]:
    """Nested settings as dotted keys; the entries of a list are numbered from one."""
    if isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value):
        value = {str(i): entry for i, entry in enumerate(value, start=1)}
        return _flat(value)
    if not isinstance(value, dict):
        return []
    found: list[tuple[str, str]] = []
    for key, entry in value.items():
        nested = _flat(entry)
        if nested:
            found += [(f"{key}.{name}", text) for name, text in nested]
        else:
            found += sections.pairs({key: entry})
    return found
