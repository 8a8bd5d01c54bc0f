"""Span replacement: words against characters, tags against spans, and the rows on which it could go wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import pytest

from residency.curate.spans import SpanReplace


def text_row(text: str, *labels: tuple[str, str], **more: Any) -> dict[str, Any]:
    """A row whose spans are the first places of the given (slot, surface)."""
    spans = [{"slot": s, "start": text.index(v), "end": text.index(v) + len(v)} for s, v in labels]
    return {"text": text, "spans": spans, **more}


def copy_of(row: dict[str, Any], **new: str) -> dict[str, Any]:
    """The one copy, values replaced by what `new` says (spaces spelt as _)."""
    table = {old.replace("_", " "): put for old, put in new.items()}
    found = SpanReplace(copies=1).augment([row], generate=lambda _, old: table[old])
    return dict(found.rows[1])


def covered(row: dict[str, Any]) -> list[str]:
    """The text at every span."""
    return [row["text"][span["start"] : span["end"]] for span in row["spans"]]


def random_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of words in which one to three values, of one or two words, stand once or more, some side by side."""
    rng = random.Random(seed)
    values = ["thai", "asian oriental", "north", "modern european", "cheap"]
    rows = []
    for _ in range(n):
        chosen = rng.sample(values, rng.randint(0, 3))
        pieces = [(v, i) for i, v in enumerate(chosen)] + [(v, None) for v in chosen if rng.random() < 0.4]
        pieces += [(rng.choice(["i", "want", "food", "the"]), None) for _ in range(rng.randint(0, 6))]
        rng.shuffle(pieces)
        tokens: list[str] = []
        spans = []
        for words, slot in pieces:
            if slot is not None:
                end = len(tokens) + len(words.split())
                spans.append({"slot": f"s{slot}", "start": len(tokens), "end": end, "value": words})
            tokens += words.split()
        rows.append({"tokens": tokens, "spans": spans})
    return rows


def as_text(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same row with character offsets, counted along the joined words."""
    starts = [sum(len(t) + 1 for t in row["tokens"][:i]) for i in range(len(row["tokens"]))]
    spans = [
        span | {"start": starts[span["start"]], "end": starts[span["end"] - 1] + len(row["tokens"][span["end"] - 1])}
        for span in row["spans"]
    ]
    return {"text": " ".join(row["tokens"]), "spans": spans}


@pytest.mark.parametrize("keys", [{}, {"rate": 0.5}, {"generator": "words", "negatives": True}])
def test_words_and_characters_give_the_same_copies(keys: dict[str, Any]) -> None:
    rows = random_rows(60)
    vocabulary = [f"w{i}" for i in range(20)]
    words = SpanReplace(**keys).augment(rows, words=vocabulary)
    characters = SpanReplace(**keys).augment([as_text(row) for row in rows], words=vocabulary)
    assert [as_text(row) for row in words.rows] == characters.rows
    assert words.replaced == characters.replaced
    assert any(len(put.split()) != len(old.split()) for r in words.replaced for old, put in r.items())


def tags(row: Mapping[str, Any]) -> list[str]:
    """One slot name per word, O outside."""
    found = ["O"] * len(row["tokens"])
    for span in row["spans"]:
        found[span["start"] : span["end"]] = [span["slot"]] * (span["end"] - span["start"])
    return found


def test_the_order_of_tags_and_the_words_outside_stay() -> None:
    rows = random_rows(60, seed=1)
    found = SpanReplace(rate=0.6).augment(rows)
    for i, new, replaced in zip(found.origin, found.rows, found.replaced, strict=True):
        old = rows[i]
        assert [tag for tag, _ in groupby(tags(new))] == [tag for tag, _ in groupby(tags(old))]
        fresh = {word for put in replaced.values() for word in put.split()}
        gone = {word for form in replaced for word in form.split()}
        assert [w for w in new["tokens"] if w not in fresh] == [w for w in old["tokens"] if w not in gone]
        for span in new["spans"]:
            assert " ".join(new["tokens"][span["start"] : span["end"]]) == span["value"]


def test_first_last_side_by_side_longer_and_shorter() -> None:
    row = text_row("thai cheap or north", ("food", "thai"), ("price", "cheap"), ("area", "north"))
    new = copy_of(row, thai="very long new", cheap="q", north="w")
    assert new["text"] == "very long new q or w"
    assert covered(new) == ["very long new", "q", "w"]
    touching = text_row("cheapthai", ("price", "cheap"), ("food", "thai"))
    assert covered(copy_of(touching, cheap="a", thai="b c")) == ["a", "b c"]


def test_spans_keep_the_order_in_which_they_were_given() -> None:
    row = text_row("cheap thai", ("food", "thai"), ("price", "cheap"))
    new = copy_of(row, thai="xx", cheap="yyyy")
    assert [s["slot"] for s in new["spans"]] == ["food", "price"]
    assert covered(new) == ["xx", "yyyy"]


def test_a_value_is_replaced_wherever_it_stands_as_a_word() -> None:
    row = text_row("No Thai here. [SEP] thai! not thailand, thai", ("food", "thai!"[:4]))
    new = copy_of(row, thai="zzz")
    assert new["text"] == "No zzz here. [SEP] zzz! not thailand, zzz"
    assert covered(new) == ["zzz"]


def test_surface_and_value_are_one_value() -> None:
    row = text_row("something inexpensive? cheap, yes", ("price", "inexpensive"))
    row["spans"][0]["value"] = "cheap"
    found = SpanReplace(copies=1).augment([row], generate=lambda *_: "zzz")
    assert found.rows[1]["text"] == "something zzz? zzz, yes"
    assert found.rows[1]["spans"][0] == {"slot": "price", "start": 10, "end": 13, "value": "zzz"}
    assert found.replaced[1] == {"inexpensive": "zzz", "cheap": "zzz"}
    row["spans"].append({"slot": "price", "start": 23, "end": 28})
    found = SpanReplace().augment([row])
    assert len(set(covered(dict(found.rows[1])))) == 1


def test_a_labelled_span_goes_before_an_occurrence_within_it() -> None:
    row = text_row("the north, a north indian place", ("area", "north"), ("food", "north indian"))
    assert copy_of(row, north="aaa", north_indian="bbb")["text"] == "the aaa, a bbb place"
    unlabelled = text_row("european. modern european. modern european or european", ("a", "european"))
    unlabelled["spans"].append({"slot": "b", "start": 10, "end": 25})
    assert copy_of(unlabelled, european="x", modern_european="y")["text"] == "x. y. y or x"


def test_letters_outside_ascii() -> None:
    row = text_row("İstanbul: café Ünlü, CAFÉ", ("name", "café"), ("place", "Ünlü"))
    new = copy_of(row, café="zz", ünlü="w")
    assert new["text"] == "İstanbul: zz w, zz"
    assert covered(new) == ["zz", "w"]


def test_random_strings_are_shaped_like_values() -> None:
    rows = [text_row(f"i want {v}", ("food", v)) for v in ("thai", "asian oriental", "ab")] * 40
    put = [new for r in SpanReplace(copies=3).augment(rows).replaced for new in r.values()]
    shapes = Counter(tuple(map(len, new.split())) for new in put)
    assert set(shapes) == {(4,), (5, 8), (2,)}
    assert min(shapes.values()) > 80
    assert set("".join(put)) <= set("abcdefghijklmnopqrstuvwxyz ")


def test_words_come_from_outside_of_all_values() -> None:
    rows = [text_row(f"please give me some {v} food today", ("food", v)) for v in ("thai", "asian oriental")]
    put = [
        new
        for r in SpanReplace(generator="words", copies=20).augment(rows, words=[*"xyz", "thai"]).replaced
        for new in r.values()
    ]
    assert {word for new in put for word in new.split()} == set("xyz")
    mine = SpanReplace(generator="words").augment([*rows, {"text": "blue green", "spans": []}])
    assert {w for r in mine.replaced for new in r.values() for w in new.split()} <= {"blue", "green"}


def test_the_rate_is_a_chance_per_value_and_copy() -> None:
    row = text_row("thai and cheap", ("food", "thai"), ("price", "cheap"))
    found = SpanReplace(rate=0.3, copies=100).augment([row] * 30)
    counts = Counter(tuple(sorted(r)) for r in found.replaced[30:])
    for kept, chance in (((), 0.49), (("thai",), 0.21), (("cheap",), 0.21), (("cheap", "thai"), 0.09)):
        assert abs(counts[kept] / 3000 - chance) < 4 * (chance * (1 - chance) / 3000) ** 0.5


def test_random_numbers_belong_to_the_row_and_the_copy() -> None:
    rows = random_rows(8)

    def make(rng: random.Random, _: str) -> str:
        return f"z{rng.random()}".replace(".", "")

    whole = SpanReplace(copies=2, negatives=True).augment(rows, generate=make)
    once = SpanReplace(copies=1, negatives=True).augment(rows, generate=make)
    fewer = SpanReplace(copies=1, negatives=True).augment(rows[:5], generate=make)
    assert whole.rows[:16] == once.rows
    assert fewer.rows[5:] == once.rows[8:13]
    both = whole.replaced[8:16], whole.replaced[16:]
    assert all(a != b for a, b in zip(*both, strict=True) if a)


def test_rows_without_a_span_are_copied_on_demand() -> None:
    rows = [text_row("thai", ("food", "thai")), text_row("thanks"), text_row("bye", dontcare=["food"])]
    found = SpanReplace().augment(rows)
    assert found.origin == [0, 1, 2, 0, 0]
    assert found.balance == {"before": 1 / 3, "after": 3 / 5}
    found = SpanReplace(negatives=True).augment(rows)
    assert found.origin == [0, 1, 2] * 3
    assert found.balance["before"] == found.balance["after"]
    assert found.rows[5] == rows[2]
    assert found.rows[5]["dontcare"] is not rows[2]["dontcare"]
    assert SpanReplace().augment([]).balance == {"before": 0, "after": 0}


def test_two_values_of_a_row_never_get_the_same_string() -> None:
    row = text_row("thai and cheap", ("food", "thai"), ("price", "cheap"))
    for r in SpanReplace(copies=50, generator="words").augment([row], words=["x", "y"]).replaced[1:]:
        assert set(r.values()) == {"x", "y"}
    with pytest.raises(ValueError, match="larger vocabulary"):
        SpanReplace(generator="words").augment([row], words=["x"])


@pytest.mark.parametrize("put", ["thai", "Thai", "oriental", "i", "", " x"])
def test_a_generator_of_real_values_is_refused(put: str) -> None:
    rows = [text_row("i want thai", ("food", "thai")), text_row("asian oriental", ("food", "asian oriental"))]
    with pytest.raises(ValueError, match="draws"):
        SpanReplace().augment(rows, generate=lambda *_: put)


def test_no_words_left() -> None:
    with pytest.raises(ValueError, match="no vocabulary"):
        SpanReplace(generator="words").augment([text_row("thai", ("food", "thai"))])


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([(0, 2), (1, 3)], "overlaps"),
        ([(0, 2), (0, 2)], "overlaps"),
        ([(1, 1)], "empty"),
        ([(2, 1)], "empty"),
        ([(2, 5)], "outside"),
        ([(-1, 1)], "outside"),
    ],
)
def test_bad_spans_are_refused_with_their_place(spans: list[tuple[int, int]], said: str) -> None:
    good = {"tokens": ["a"], "spans": []}
    bad = {"tokens": ["a", "b", "c"], "spans": [{"slot": "s", "start": a, "end": b} for a, b in spans]}
    with pytest.raises(ValueError, match=f"row 1: .*{said}"):
        SpanReplace().augment([good, bad])


@pytest.mark.parametrize("span", [(6, 11), (7, 12), (6, 7)])
def test_a_span_is_made_of_words(span: tuple[int, int]) -> None:
    row = {"text": "i want thai food", "spans": [{"slot": "food", "start": span[0], "end": span[1]}]}
    with pytest.raises(ValueError, match="row 0: .*blank"):
        SpanReplace().augment([row])


@pytest.mark.parametrize("value", ["", None])
def test_a_value_that_says_nothing(value: str | None) -> None:
    row = text_row("i want thai food", ("food", "thai"))
    row["spans"][0]["value"] = value
    assert copy_of(row, thai="zz")["text"] == "i want zz food"


@pytest.mark.parametrize("row", [{"text": "a"}, {"spans": []}, {"text": "a", "tokens": ["a"], "spans": []}])
def test_a_row_is_of_words_or_of_characters(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="row 0: needs `spans`"):
        SpanReplace().augment([row])
