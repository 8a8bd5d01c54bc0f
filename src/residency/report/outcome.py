"""The first screen of a report: the outcome in one sentence, the tiles, and the banner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from residency.report import formats as fmt
from residency.report.facts import Change, Facts, Stage
from residency.report.formats import dig, number


@dataclass(frozen=True)
class Tile:
    """One number of the specialist beside the base's.

    Attributes:
        mood: ``gain``, ``loss``, or ``unclear`` where neither can be said.
    """

    label: str
    value: str
    was: str
    delta: str
    mood: str


# (label, path in an exam, how to write it, whether more is better, "fewer" or "less")
_EFFICIENCY = (
    ("Parameters", ("cost", "parameters"), fmt.count, False, "fewer"),
    ("On disk", ("cost", "bytes_on_disk"), fmt.size, False, "less"),
    ("KV per token", ("cost", "kv_bytes_per_token"), fmt.size, False, "less"),
    ("Tokens/s", ("measured", "tokens_per_second"), fmt.measure, True, ""),
    (
        "First token",
        ("measured", "time_to_first_token_ms"),
        lambda v: fmt.measure(v, "ms"),
        False,
        "less",
    ),
    ("Peak memory", ("measured", "peak_memory_bytes"), fmt.size, False, "less"),
)


def ratio(before: Any, after: Any, fewer: str) -> str:
    """How two sizes compare: ``27 % fewer``, ``3 % more``, ``unchanged``, or nothing."""
    old, new = number(before), number(after)
    if old is None or new is None or old <= 0:
        return ""
    percent = round(100 * (new / old - 1))
    if percent == 0:
        return "unchanged"
    if percent >= 100:
        return times(old, new)
    return f"{abs(percent)} % {fewer if percent < 0 else 'more'}"


def times(before: Any, after: Any) -> str:
    """How two speeds compare: ``1.4×``, or nothing."""
    old, new = number(before), number(after)
    if old is None or new is None or old <= 0:
        return ""
    factor = new / old
    return f"{factor:.2f}×" if factor < 1 else f"{factor:.1f}×" if factor < 100 else f"{factor:.0f}×"


def outcome_sentence(record: dict[str, Any]) -> str:
    """What a run came to, in one sentence: the first line of the report, and the last of a run."""
    return sentence(Facts(record))


def sentence(facts: Facts) -> str:
    """The outcome in one sentence."""
    base, final = facts.base, facts.final
    if base is None:
        return "Nothing has been examined yet."
    if final is None:
        span = base.cells["score_span"]
        interval = "" if span == fmt.NONE else f" (95 % interval {span})"
        score = f"{base.cells['score']}{facts.scale.suffix}"
        return f"The base scores {score}{interval}; no step has been examined yet."
    parts = [_score_clause(facts, base, final)]
    for path, fewer, noun in (
        (("cost", "parameters"), "fewer", "parameters"),
        (("cost", "bytes_on_disk"), "less", "on disk"),
    ):
        found = ratio(dig(base.exam, *path), dig(final.exam, *path), fewer)
        if found and found != "unchanged":
            parts.append(f"{found} {noun}")
            break
    speed = ("measured", "tokens_per_second")
    faster = times(dig(base.exam, *speed), dig(final.exam, *speed))
    if faster:
        parts.append(f"{faster} tokens/s")
    if final.guard_change is not None:
        parts.append(f"guard {final.guard_change.text}{_caveat(final.guard_change)}")
    return "; ".join(parts) + "."


def _score_clause(facts: Facts, base: Stage, final: Stage) -> str:
    clause = f"Task score {base.cells['score']} → {final.cells['score']}{facts.scale.suffix}"
    change = final.change
    if change is None:
        return clause
    span = "" if change.span == fmt.NONE else f", 95 % interval {change.span}"
    return f"{clause} ({change.text}{span}{_caveat(change)})"


def _caveat(change: Change) -> str:
    if change.verdict == "unclear":
        return ", not distinguishable from no change"
    return ", a clear loss" if change.verdict == "loss" else ""


def tiles(facts: Facts) -> list[Tile]:
    """The numbers of the first screen, those that exist."""
    base, final = facts.base, facts.final
    if base is None:
        return []
    last = final or base
    found = []
    for label, key, change in (
        ("Task score", "score", last.change),
        ("Guard", "guard", last.guard_change),
    ):
        if last.cells[key] == fmt.NONE:
            continue
        delta = f"{change.text} {change.words}" if change else last.cells[f"{key}_span"]
        mood = change.verdict if change and change.verdict != "bare" else "unclear"
        found.append(Tile(label, last.cells[key], base.cells[key] if final else "", delta, mood))
    for label, path, write, more_is_better, fewer in _EFFICIENCY:
        before, after = number(dig(base.exam, *path)), number(dig(last.exam, *path))
        if after is None:
            continue
        delta, mood = "", "unclear"
        if final and before is not None:
            delta = ratio(before, after, fewer) if fewer else times(before, after)
            noise = 0.03 if path[0] == "measured" else 0.0
            if abs(after - before) > noise * abs(before):
                mood = "gain" if (after > before) == more_is_better else "loss"
        was = write(before) if final and before is not None else ""
        found.append(Tile(label, write(after), was, delta, mood))
    return found


def banner(facts: Facts) -> dict[str, str] | None:
    """What to say above everything else when the run did not finish; None when it did."""
    if facts.status == "done":
        return None
    done = sum(1 for step in facts.steps if dig(step, "status", default="done") in ("done", "cached"))
    exams = len(facts.exams)
    progress = f"{done} step{' is' if done == 1 else 's are'} done, {exams} exam{' is' if exams == 1 else 's are'} in"
    error = str(dig(facts.record, "error", default=""))
    texts = {
        "running": ("Still running", f"{progress}; this page shows what exists so far."),
        "failed": ("This run failed", f"{progress}; what stands below is what was kept."),
        "interrupted": (
            "This run was interrupted",
            f"{progress}. Running the same recipe again goes on from the last valid step.",
        ),
    }
    title, text = texts.get(facts.status, (f"Status: {facts.status}", f"{progress}."))
    return {"status": facts.status, "title": title, "text": text, "error": error}


def subtitle(facts: Facts) -> list[str]:
    """The small print under the sentence: metric, items, base, seed, when, how long."""
    record = facts.record
    metric = dig(record, "task", "metric")
    n = dig(facts.base.exam, "task", "n") if facts.base else None
    seed, base = dig(record, "seed"), dig(record, "base", "name")
    when = dig(record, "time", "finished") or dig(record, "time", "started")
    seconds = dig(record, "time", "seconds")
    chance = number(dig(record, "task", "chance"))
    parts = [
        f"{metric} on {fmt.plain(n)} test items" if metric and n else metric,
        f"chance {facts.scale.text(chance)}" if chance is not None else None,
        f"base {base}" if base else None,
        f"seed {seed}" if seed is not None else None,
        fmt.moment(when) if when else None,
        fmt.duration(seconds) if number(seconds) is not None else None,
    ]
    return [str(part) for part in parts if part]
