"""Readability: syllables of a dictionary's words, the formulas on sentences counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate.readability import Readability, syllables

# counts of the CMU Pronouncing Dictionary
KNOWN = {
    1: "the a wall roof make walked jumps cakes through strengths see tied blue eye",
    2: "table tables wanted needed houses boxes garage window little able happy reading lion safely building's issues",
    3: "permission beautiful radio another replacement chemistry video government requirement",
    4: "information necessary application television community",
    5: "university electricity organization",
}


@pytest.mark.parametrize(("count", "word"), [(count, word) for count, words in KNOWN.items() for word in words.split()])
def test_syllables(count, word):
    assert syllables(word) == count
    assert syllables(word.upper()) == count


def of(text, **params):
    return Readability(**params).score([text])[0]


def test_the_formulas_by_hand():
    # 10 words, 2 sentences, 13 syllables, one word of three
    text = "The cat sat on a mat. It needed permission now!"
    assert of(text) == pytest.approx(206.835 - 1.015 * 5 - 84.6 * 13 / 10)
    assert of(text, form="fog") == pytest.approx(0.4 * (5 + 100 / 10))


def test_simple_is_easier_than_learned():
    simple = "The dog ran. It was fast. We saw it go."
    learned = (
        "Notwithstanding administrative complications, the municipality's representatives reconsidered applications."
    )
    assert of(simple) > 90 > 0 > of(learned)
    assert of(simple, form="fog") < 5 < of(learned, form="fog")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It costs 3.50 at no. Then go", 2),
        ("One\ntwo\n\nthree", 3),
        ('He said "stop." Then left.', 2),
        ("What?! No... yes", 3),
        ("no end", 1),
        ("... !? end.", 1),
    ],
)
def test_sentences(text, sentences):
    import re

    words = len(re.findall(r"[A-Za-z]+", text))
    assert of(text, form="fog") == pytest.approx(0.4 * words / sentences)


def test_no_words_no_value():
    assert np.isnan(of("12 -- !"))
    assert np.isnan(of(""))
