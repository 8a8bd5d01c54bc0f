"""Formulas over columns, against Python's own evaluation row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from residency.curate.expressions import Formula, percentile

COLUMNS = {
    "ifd": np.array([0.5, 1.2, np.nan, 0.9, 0.9]),
    "least-confidence": np.array([0.1, 0.2, 0.3, 0.4, 0.5]),
    "length": np.array([4.0, 50, 600, 7, 8]),
    "tag": np.array(["a", "b", "least-confidence", "a", ""], object),
}
KNOWN = tuple(COLUMNS)


def value(text):
    return Formula(text, KNOWN)(COLUMNS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ifd < 1", [1, 0, 0, 1, 1]),
        ("not ifd < 1", [0, 1, 1, 0, 0]),
        ("missing(ifd)", [0, 0, 1, 0, 0]),
        ("ifd != 0.9", [1, 1, 0, 0, 0]),
        ("5 < length < 100 and least-confidence > 0.15", [0, 1, 0, 1, 1]),
        ("tag == 'a' or tag == 'least-confidence'", [1, 0, 1, 1, 0]),
        ("tag in ['a', 'b']", [1, 1, 0, 1, 0]),
        ("tag not in ['a', 'b']", [0, 0, 1, 0, 1]),
        ("length in [4, 8]", [1, 0, 0, 0, 1]),
        ("percentile(length) > 50", [0, 1, 1, 0, 1]),
        ("rank(length) <= 2", [0, 1, 1, 0, 0]),
        ("least-confidence*2 - -1 > 1.5", [0, 0, 1, 1, 1]),
        ("-least-confidence < -0.3", [0, 0, 0, 1, 1]),
        ("1 -least-confidence < 0.75", [0, 0, 1, 1, 1]),
        ("minimum(length, 8) ** 2 == 64", [0, 1, 1, 0, 1]),
    ],
)
def test_conditions(text, expected):
    assert value(text).tolist() == [bool(e) for e in expected]


def test_values_and_the_columns_they_use():
    formula = Formula("scaled(length) + log(least-confidence)", KNOWN)
    assert formula.names == {"length", "least-confidence"}
    length = COLUMNS["length"]
    expected = (length - length.mean()) / length.std() + np.log(COLUMNS["least-confidence"])
    np.testing.assert_allclose(formula(COLUMNS), expected)
    assert value("3").tolist() == [3] * 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3) | st.just(math.nan), min_size=1, max_size=12))
def test_percentiles_are_mean_ranks(values):
    x = np.array(values, float)
    there = x[~np.isnan(x)]
    if len(there):
        np.testing.assert_allclose(percentile(x)[~np.isnan(x)], 100 * stats.rankdata(there) / len(there))
    assert np.isnan(percentile(x)[np.isnan(x)]).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ifdd < 1", "did you mean `ifd`"),
        ("ifd <", "does not read"),
        ("", "does not read"),
        ("__import__('os')", "functions:"),
        ("ifd.real", "may not"),
        ("[x for x in ifd]", "may not"),
        ("lambda: 1", "may not"),
        ("(ifd := 1)", "may not"),
        ("length // 2", "operation"),
        ("True", "may not"),
        ("percentile(ifd, 2)", "functions:"),
    ],
)
def test_what_may_not_stand_there_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        Formula(text, KNOWN)


@pytest.mark.parametrize("text", ["tag + 1", "tag < 'b'", "tag == 3", "ifd and length", "log(tag) > 1", "tag in 'abc'"])
def test_texts_are_not_numbers(text):
    with pytest.raises(ValueError, match="formula"):
        value(text)
