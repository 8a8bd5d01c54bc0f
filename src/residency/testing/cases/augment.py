"""Cases of the methods that make rows out of rows."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from typing import Any, ClassVar

from residency.testing.roles import Case


class AugmenterCase(Case):
    """Labelled rows → the same rows and copies with other values, each with its provenance."""

    role = "Augmenter"
    settings: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Parameters to try; consecutive ones must give different answers."""
    untouched: ClassVar[dict[str, Any]]
    """Parameters under which copies are the rows as they are."""
    whole: ClassVar[dict[str, Any]]
    """Parameters under which no copy keeps a value."""

    @property
    def params(self) -> Any:
        """The method's class is its parameter model."""
        from residency import catalog

        return (self.row or catalog.method(self.name)).load()

    def problem(self) -> list[dict[str, Any]]:
        """Rows of text and character spans."""
        raise NotImplementedError("abstract: a problem")

    def reference(self, row: dict[str, Any], replaced: dict[str, str]) -> dict[str, Any]:
        """The copy of a row in which these values are replaced, written independently."""
        raise NotImplementedError("abstract: the reference")

    def augment(self, rows: Any, **params: Any) -> Any:
        """Rows and copies."""
        return self.params(**params).augment(rows)

    def copies(self, **params: Any) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, str]]]:
        """(row, copy, what was replaced) of every copy."""
        rows = self.problem()
        found = self.augment(rows, **params)
        return [
            (rows[i], new, replaced) for i, new, replaced in zip(found.origin, found.rows, found.replaced, strict=True)
        ][len(rows) :]

    def check_reference(self) -> None:
        """Every copy equals an independent replacement; every parameter changes something."""
        found = []
        for params in self.settings:
            copies = self.copies(**params)
            assert copies, f"no copies with {params}"
            for row, new, replaced in copies:
                assert new == self.reference(row, replaced), f"with {params}: {new}"
            found.append([new for _, new, _ in copies])
        assert all(a != b for a, b in pairwise(found)), "a parameter changed nothing"

    def check_round_trip(self) -> None:
        """The text at every span of a copy is its value, and what lies outside of what was replaced is as it was."""
        for params in self.settings:
            for row, new, replaced in self.copies(**params):
                for before, span in zip(row["spans"], new["spans"], strict=True):
                    old = row["text"][before["start"] : before["end"]]
                    assert new["text"][span["start"] : span["end"]] == replaced.get(old.lower(), old)
                rest = [_without(row["text"], replaced), _without(new["text"], replaced.values())]
                assert rest[0] == rest[1], rest

    def check_size(self) -> None:
        """|D'| = |D| + n |rows with a span|, the rows themselves first and unchanged."""
        for n in (0, 1, 3):
            rows = self.problem()
            found = self.augment(rows, **self.settings[0] | {"copies": n})
            assert len(found.rows) == len(rows) + n * sum(bool(row["spans"]) for row in rows)
            assert found.rows[: len(rows)] == rows
            assert len(found.rows) == len(found.origin) == len(found.replaced)

    def check_limits(self) -> None:
        """At the setting that changes nothing copies equal their rows; at the other end no value is left in any."""
        assert all(row == new and not replaced for row, new, replaced in self.copies(**self.untouched))
        for row, new, _ in self.copies(**self.whole):
            for span in row["spans"]:
                old = re.escape(row["text"][span["start"] : span["end"]])
                assert not re.search(rf"(?<!\w){old}(?!\w)", new["text"], re.IGNORECASE), new["text"]

    def check_no_real_value(self) -> None:
        """No new string is, or has a word of, a value of the data."""
        words = {
            word
            for row in self.problem()
            for span in row["spans"]
            for word in row["text"][span["start"] : span["end"]].lower().split()
        }
        for params in self.settings:
            for *_, replaced in self.copies(**params):
                assert not words & {word for new in replaced.values() for word in new.lower().split()}

    def check_deterministic_and_pure(self) -> None:
        """The same call gives the same rows; the rows given and the global random states stay as they were."""
        from residency.testing.rowroles import random_states

        rows = self.problem()
        kept, state = copy.deepcopy(rows), random_states()
        a, b = (self.augment(rows, **self.settings[0]) for _ in range(2))
        assert a == b
        for new in a.rows[len(rows) :]:
            new["spans"].clear()
        assert rows == kept, "the rows given were changed, or are shared with a copy"
        assert random_states() == state, "a global random state moved"

    def check_tokenizer(self) -> None:
        """The offsets of a word-piece tokenizer find whole tokens for every span of a copy, and decode to its value."""
        tokenizer = _word_pieces()
        for _, new, _ in self.copies(**self.settings[0]):
            read = tokenizer.encode(new["text"])
            for span in new["spans"]:
                inside = [t for t, (a, b) in enumerate(read.offsets) if span["start"] <= a and b <= span["end"]]
                assert read.offsets[inside[0]][0] == span["start"]
                assert read.offsets[inside[-1]][1] == span["end"]
                said = tokenizer.decode([read.ids[t] for t in inside])
                assert said == new["text"][span["start"] : span["end"]].lower(), said

    def check_bad_rows(self) -> None:
        """Spans that overlap, are empty or out of range are refused; no rows give no rows."""
        assert self.augment([]).rows == []
        text = "a cheap place"
        for places in (((2, 7), (5, 9)), ((3, 3),), ((2, 99),), ((-3, 2),)):
            spans = [{"slot": "s", "start": a, "end": b} for a, b in places]
            try:
                self.augment([{"text": text, "spans": spans}])
            except ValueError:
                continue
            raise AssertionError(f"accepted: {places}")


class SpanReplaceCase(AugmenterCase):
    """Reference: one regular expression over text and over what stands before each span."""

    name = "span-replace"
    settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"rate": 0.5},
        {"rate": 0.5, "seed": 1},
        {"generator": "words"},
        {"generator": "words", "copies": 1},
        {"generator": "words", "copies": 1, "negatives": True},
    )
    untouched: ClassVar[dict[str, Any]] = {"rate": 0.0}
    whole: ClassVar[dict[str, Any]] = {"rate": 1.0}

    def problem(self) -> list[dict[str, Any]]:
        """Spans first, last, side by side, repeated, of one and of several words, without a value, none at all."""
        return [
            _row("Chinese or cheap, chinese again", ("food", "Chinese"), ("price", "cheap")) | {"id": 7},
            _row("i want asian oriental", ("food", "asian oriental")),
            _row("north thai food in the north, not thailand", ("area", "north"), ("food", "thai")),
            _row("modern european, or european?", ("food", "modern european")),
            _row("thank you, goodbye"),
        ]

    def reference(self, row: dict[str, Any], replaced: dict[str, str]) -> dict[str, Any]:
        def swap(text: str) -> str:
            if not replaced:
                return text
            sought = "|".join(sorted(map(re.escape, replaced), key=len, reverse=True))
            return re.sub(rf"(?i)\b(?:{sought})\b", lambda m: replaced[m[0].lower()], text)

        spans = []
        for span in row["spans"]:
            start, new = len(swap(row["text"][: span["start"]])), swap(row["text"][span["start"] : span["end"]])
            spans.append(span | {"start": start, "end": start + len(new), "value": new})
        return row | {"text": swap(row["text"]), "spans": spans}


def _row(text: str, *labels: tuple[str, str]) -> dict[str, Any]:
    spans = [
        {"slot": slot, "start": text.index(value), "end": text.index(value) + len(value), "value": value}
        for slot, value in labels
    ]
    return {"text": text, "spans": spans}


def _without(text: str, strings: Any) -> list[str]:
    """What is left of a text when strings are cut out of it."""
    sought = "|".join(sorted(map(re.escape, strings), key=len, reverse=True))
    return re.split(rf"(?i)\b(?:{sought})\b", text) if sought else [text]


def _word_pieces() -> Any:
    """A lower-casing word-piece tokenizer that knows letters and signs."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = [*"abcdefghijklmnopqrstuvwxyz,.?!", "chi", "##nese", "food"]
    vocabulary = ["[UNK]", *pieces, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
