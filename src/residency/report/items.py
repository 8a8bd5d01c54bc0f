"""The exam item by item: what each step fixed and broke, and the strip of all items at a glance."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from residency.report import formats as fmt
from residency.report.facts import Change, Facts
from residency.report.formats import dig, mapping, mappings, number

SHOWN = 200
STRIP_LIMIT = 600
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")
_KINDS = {0.0: "wrong", 1.0: "right"}


@dataclass(frozen=True)
class Flip:
    """One item whose outcome changed."""

    id: str
    prompt: str
    answer: str
    before: str
    after: str
    image: str = ""  # a data: address, or nothing


@dataclass(frozen=True)
class Flips:
    """The items a change fixed and broke; at most `SHOWN` of each with their text."""

    change: Change
    title: str
    fixed: list[Flip]
    broken: list[Flip]

    @property
    def counts(self) -> tuple[int, int]:
        """How many were fixed and how many broken, shown or not."""
        return len(self.change.fixed), len(self.change.broken)

    @property
    def groups(self) -> list[tuple[str, str, list[Flip], int]]:
        """(name, mood, flips, how many more there are) of the two groups."""
        fixed, broken = self.counts
        return [
            ("Fixed", "gain", self.fixed, fixed - len(self.fixed)),
            ("Broken", "loss", self.broken, broken - len(self.broken)),
        ]


def flips(facts: Facts, change: Change | None, *, guard: bool = False) -> Flips | None:
    """The flips of a change with their text; None where nothing was compared item by item."""
    if change is None:
        return None
    kind = "guard" if guard else "task"
    texts = mapping(facts.record, kind, "items")
    before = _predictions(facts.exam(change.against), kind)
    after = _predictions(facts.exam(change.of), kind)

    def read(identity: str) -> Flip:
        return Flip(
            id=identity,
            prompt=str(dig(texts, identity, "prompt", default="")),
            answer=str(dig(texts, identity, "answer", default=fmt.NONE)),
            before=before.get(identity, fmt.NONE),
            after=after.get(identity, fmt.NONE),
            image=picture(dig(texts, identity, "image")),
        )

    return Flips(
        change=change,
        title=f"{facts.label(change.of)} against {facts.label(change.against)}",
        fixed=[read(i) for i in change.fixed[:SHOWN]],
        broken=[read(i) for i in change.broken[:SHOWN]],
    )


def picture(address: Any) -> str:
    """A picture the page carries in itself; anything else would be a request."""
    return address if isinstance(address, str) and _PICTURE.fullmatch(address) else ""


def _predictions(exam: dict[str, Any], kind: str) -> dict[str, str]:
    return {str(item.get("id")): fmt.plain(item.get("prediction")) for item in mappings(exam, kind, "items")}


@dataclass(frozen=True)
class Strip:
    """Every item of every exam as one row of cells, items in one order for all rows.

    Attributes:
        rows: (label of the exam, share of right answers as text, cells); a cell is the item's
            score between 0 and 1, or None where the item was not asked.
        titles: What each column is, for those who hover.
    """

    rows: list[tuple[str, str, list[float | None]]]
    titles: list[str]

    @property
    def partial(self) -> bool:
        """Whether any item was answered in part."""
        return any(v not in (None, 0.0, 1.0) for _, _, cells in self.rows for v in cells)

    def paths(self, cells: list[float | None]) -> list[tuple[str, str]]:
        """The cells as SVG paths, one path per kind of cell: small however many items."""
        found: dict[str, list[str]] = {}
        for x, value in enumerate(cells):
            kind = "none" if value is None else _KINDS.get(value, "part")
            found.setdefault(kind, []).append(f"M{x} 0h.86v1h-.86z")
        return [(kind, "".join(parts)) for kind, parts in found.items()]


def strip(facts: Facts, kind: str = "task") -> Strip | None:
    """The strip of an exam; None where scores are not between 0 and 1, or there is one exam."""
    scores: list[tuple[str, str, dict[str, float | None]]] = []
    for exam in facts.exams:
        found = {str(item.get("id")): number(item.get("score")) for item in mappings(exam, kind, "items")}
        if found:
            scale = facts.scale if kind == "task" else facts.guard_scale
            text = scale.text(dig(exam, kind, "value"))
            scores.append((facts.label(str(exam.get("id"))), text, found))
    ids = list(dict.fromkeys(identity for _, _, found in scores for identity in found))
    values = [v for _, _, found in scores for v in found.values() if v is not None]
    if len(scores) < 2 or not 0 < len(ids) <= STRIP_LIMIT or not values:
        return None
    if min(values) < 0 or max(values) > 1:
        return None

    def pattern(identity: str) -> tuple[float, ...]:
        row = [found.get(identity) for _, _, found in scores]
        known = [v if v is not None else 0.0 for v in row]
        return (-(known[0] >= 0.5), -(known[-1] >= 0.5), *(-v for v in known))

    ids.sort(key=lambda identity: (pattern(identity), identity))
    texts = mapping(facts.record, kind, "items")
    return Strip(
        rows=[(label, text, [found.get(i) for i in ids]) for label, text, found in scores],
        titles=[f"{i}: {fmt.clip(dig(texts, i, 'prompt', default=''), 120)}" for i in ids],
    )
