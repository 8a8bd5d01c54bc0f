"""Span replacement: copies of labelled rows in which values are swapped for new strings, every span label kept right.

A model that fills slots by copying a span of the text tends to learn the values themselves instead of the words around
them, and then misses values it has not seen. Copies in which values are strings that it cannot know teach the words
around them. Rows D, n copies, rate ρ:

    D′ = D
    n times: for each row with a span
        for each value in it, with probability ρ:  put one new string in place of every occurrence of the value
        shift all spans behind by the difference in length;  append the copy

so |D′| = |D| + n |rows with a span|. n buys accuracy on unseen values with training time; ρ trades unseen values
against seen ones. ρ = 0 copies the rows as they are.

A row is a dict with `spans`, a list of {slot, start, end, value?}, end exclusive, over `tokens` (a list of words) or
over the characters of `text`. Its other keys go along unchanged. One value of a row may have several surfaces: those
its spans cover and the `value` they name (upper and lower case are the same); all of them get the same new string,
labelled or not, where they stand between word boundaries. A labelled span goes before an unlabelled occurrence that
overlaps it ("north" within the labelled "north indian"), a longer occurrence before a shorter one.

New strings: "random" takes a value of the data by chance and replaces each of its words by letters a–z of the same
number, which keeps the lengths in words and characters; "words" takes as many words of a vocabulary. Random letters
break into rare word pieces, so that a model may learn "gibberish is a value"; real words do not have that tell-tale.
Neither ever gives a word that occurs in a value or in the row, nor the same string to two values of a row.

Paper: Song, Zang, Su, Wu, Han & Hu, "Data Augmentation for Copy-Mechanism in Dialogue State Tracking", 2020, arXiv
2002.09634 (the idea: duplicate utterances, real values replaced by randomly generated strings; how many copies, how
many values). Official code: none released. Reconstructed from the abstract; ours: one draw per value and not per span,
lengths from the data, the generator "words", rows without a span copied only on demand, the seed per (row, copy).

Time and memory: linear in the text of D′; 2,500 turns with n = 2 take a quarter of a second.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from residency.step import Params

Row = Mapping[str, Any]
Generate = Callable[[random.Random, str], str]
"""Makes a new string for an old one."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TRIES = 200
"""Draws before a generator is given up as unable to leave the real values."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Augmented:
    """Rows and copies.

    Args:
        rows: D and behind it the copies, first copies of all rows first; the rows of D are the given objects.
        origin: For every row, the position in D of the row that it is or is made of.
        replaced: For every row, old surface → new string; empty where nothing was replaced.
    """

    rows: list[Row]
    origin: list[int]
    replaced: list[dict[str, str]]

    @property
    def balance(self) -> dict[str, float]:
        """The share of rows with a span, `before` and `after`: copying only those shifts it."""
        given = [bool(row["spans"]) for row in self.rows]
        size = len(set(self.origin))
        return {"before": sum(given[:size]) / max(1, size), "after": sum(given) / max(1, len(given))}


@dataclass(frozen=True)
class _Place:
    """Where a value stands: positions in the row, which value (number within the row), which span if it is labelled."""

    start: int
    end: int
    value: int
    span: int | None


class SpanReplace(Params):
    """Copies of rows with new values in place of the labelled ones."""

    copies: int = Field(2, ge=0, le=100)
    """Copies of every row with a span: more cost more training."""
    rate: float = Field(1.0, ge=0, le=1)
    """Chance of each value to be replaced in a copy: higher helps unseen values and hurts seen ones."""
    generator: Literal["random", "words"] = "random"
    """New strings: random letters as long as real values, or real words that are no values."""
    negatives: bool = False
    """Also copy the rows without a span, as they are, so that their share stays."""
    seed: int = Field(0, ge=0)
    """Seed; every copy of every row has random numbers of its own."""

    def augment(
        self, rows: Sequence[Row], *, words: Sequence[str] | None = None, generate: Generate | None = None
    ) -> Augmented:
        """Rows and their copies.

        Args:
            rows: See the module.
            words: The vocabulary of "words"; by default what the rows' texts have outside of all values.
            generate: A generator of one's own in place of `generator`: given random numbers and the old string, a new
                one. It is asked again when it gives a real value.

        Raises:
            ValueError: When a row or a span is none (see `checked`), or the generator finds no string that is no value.
        """
        places = [_places(row, f"row {i}") for i, row in enumerate(rows)]
        values = sorted({form for _, forms in places for group in forms for form in group})
        taken = {word for value in values for word in _WORD.findall(value)} | set(values)
        make = generate or self._generator(rows, values, taken, words)
        out = Augmented(list(rows), list(range(len(rows))), [{} for _ in rows])
        for copy in range(self.copies):
            for i, row in enumerate(rows):
                if not row["spans"] and not self.negatives:
                    continue
                rng = random.Random(f"{self.seed} {i} {copy}")
                found, forms = places[i]
                new: dict[int, str] = {}
                avoid = taken | set(_WORD.findall(_text(row).lower()))
                for value, group in enumerate(forms):
                    if rng.random() < self.rate:
                        new[value] = _fresh(make, rng, group[0], avoid, f"row {i}")
                        avoid = avoid | set(_WORD.findall(new[value].lower()))
                out.rows.append(_rewritten(row, found, new))
                out.origin.append(i)
                out.replaced.append({form: new[value] for value in new for form in forms[value]})
        return out

    def _generator(
        self, rows: Sequence[Row], values: Sequence[str], taken: set[str], words: Sequence[str] | None
    ) -> Generate:
        shapes = [[len(word) for word in value.split()] for value in values]
        if self.generator == "random":
            return lambda rng, _: " ".join("".join(rng.choices(LETTERS, k=length)) for length in rng.choice(shapes))
        if words is None:
            words = [word for row in rows for word in _WORD.findall(_text(row).lower()) if word.isalpha()]
        pool = sorted({word for word in words if word.lower() not in taken})
        if shapes and not pool and self.rate and self.copies:
            raise ValueError("no vocabulary has been left for `generator: words`: give `words`, or take random letters")
        return lambda rng, _: " ".join(rng.choice(pool) for _ in rng.choice(shapes))


def surface(row: Row, span: Mapping[str, Any]) -> str:
    """The text that a span covers."""
    start, end = span["start"], span["end"]
    return " ".join(row["tokens"][start:end]) if "tokens" in row else str(row["text"][start:end])


def value_of(row: Row, span: Mapping[str, Any]) -> str:
    """What a span's `value` says, or the text that it covers; in lower case."""
    named = str(span.get("value") or "").strip()
    return (named or surface(row, span)).lower()


def checked(row: Row, where: str) -> list[Mapping[str, Any]]:
    """The spans of a row in the order of their starts.

    Raises:
        ValueError: When the row has not one of `tokens` and `text`, or a span is empty, out of range, overlaps
            another, or begins or ends with a blank.
    """
    if ("tokens" in row) == ("text" in row) or "spans" not in row:
        raise ValueError(f"{where}: needs `spans`, and either `tokens` or `text`; it has {sorted(row)}")
    size = len(row["tokens"] if "tokens" in row else row["text"])
    spans = sorted(row["spans"], key=lambda span: (span["start"], span["end"]))
    behind = 0
    for span in spans:
        said = f"{where}: the span {span['start']}-{span['end']} of slot {span['slot']!r}"
        if not 0 <= span["start"] < span["end"] <= size:
            raise ValueError(f"{said} is empty or outside of 0-{size} (ends are exclusive)")
        if span["start"] < behind:
            raise ValueError(f"{said} overlaps the one before it: give each stretch of text one span")
        if (text := surface(row, span)) != text.strip():
            raise ValueError(f"{said} begins or ends with a blank: {text!r}")
        behind = span["end"]
    return spans


def _text(row: Row) -> str:
    return " ".join(row["tokens"]) if "tokens" in row else str(row["text"])


def _places(row: Row, where: str) -> tuple[list[_Place], list[list[str]]]:
    """Every place of every value, without overlaps and in order, and the lower-case forms of each value."""
    spans = checked(row, where)
    forms: list[list[str]] = []
    for span in spans:  # values that share a form are one value
        mine = [surface(row, span).lower(), value_of(row, span)]
        shared = [group for group in forms if set(group) & set(mine)]
        forms = [group for group in forms if group not in shared]
        forms.append(list(dict.fromkeys(form for group in (*shared, mine) for form in group)))
    value = {form: i for i, group in enumerate(forms) for form in group}
    numbers = {id(span): i for i, span in enumerate(row["spans"])}
    found = [_Place(s["start"], s["end"], value[surface(row, s).lower()], numbers[id(s)]) for s in spans]
    for form in sorted(value, key=lambda form: (-len(form), form)):
        for start, end in _occurrences(row, form):
            if all(end <= place.start or place.end <= start for place in found):
                found.append(_Place(start, end, value[form], None))
    return sorted(found, key=lambda place: place.start), forms


def _occurrences(row: Row, form: str) -> list[tuple[int, int]]:
    """Where a lower-case form stands between word boundaries."""
    if "text" in row:
        pattern = rf"(?<!\w){re.escape(form)}(?!\w)"
        return [match.span() for match in re.finditer(pattern, row["text"], re.IGNORECASE)]
    tokens, sought = [token.lower() for token in row["tokens"]], form.split()
    n = len(sought)
    return [(i, i + n) for i in range(len(tokens) - n + 1) if n and tokens[i : i + n] == sought]


def _fresh(make: Generate, rng: random.Random, old: str, avoid: set[str], where: str) -> str:
    """A string none of whose words is a value's or the row's."""
    for _ in range(TRIES):
        new = make(rng, old)
        parts = _WORD.findall(new.lower())
        if parts and new.strip() == new and not avoid.intersection((*parts, new.lower())):
            return new
    raise ValueError(
        f"{where}: {TRIES} draws gave no string in place of {old!r} that is no word of a value or of the row: "
        "use a larger vocabulary"
    )


def _rewritten(row: Row, places: Sequence[_Place], new: Mapping[int, str]) -> Row:
    """The row with new strings in their places, and its spans where they now are."""
    whole: Any = row["tokens"] if "tokens" in row else row["text"]
    spans = [dict(span) for span in row["spans"]]
    pieces: list[Any] = []
    done = length = 0
    for place in places:
        put = whole[place.start : place.end]
        if place.value in new:
            put = new[place.value].split() if "tokens" in row else new[place.value]
        start = length + place.start - done
        pieces += [whole[done : place.start], put]
        done, length = place.end, start + len(put)
        if place.span is not None:
            spans[place.span] |= {"start": start, "end": length}
            if place.value in new and "value" in spans[place.span]:
                spans[place.span]["value"] = new[place.value]
    pieces.append(whole[done:])
    rest = {key: deepcopy(kept) for key, kept in row.items() if key not in ("tokens", "text", "spans")}
    if "tokens" in row:
        return rest | {"tokens": [token for piece in pieces for token in piece], "spans": spans}
    return rest | {"text": "".join(pieces), "spans": spans}
