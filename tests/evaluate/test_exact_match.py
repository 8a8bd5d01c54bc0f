"""Exact match against SQuAD's script as torchmetrics ships it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.errors import DataError
from residency.evaluate.exact_match import ExactMatch, normalise

CASES = [
    ("The permit.", ["permit"], 1),
    ("a  wall,\n(high)", ["Wall high!"], 1),
    ("theory", ["ory"], 0),
    ("año", ["ano"], 0),
    ("2 metres", ["3 metres", "2 METRES"], 1),
    ("", ["the"], 1),
    ("", ["x"], 0),
    ("the", ["a"], 1),
    ("¿qué?", ["qué"], 0),
]


def test_cases():
    metric = ExactMatch()
    for i, (said, targets, _) in enumerate(CASES):
        metric.update(str(i), said, targets)
    score = metric.compute()
    assert [item.score for item in score.items] == [right for _, _, right in CASES]
    assert score.value == pytest.approx(sum(right for _, _, right in CASES) / len(CASES))


text = st.text("aAbt heT.,-'’¿ñé\n\t12", max_size=12)


@given(st.lists(st.tuples(text, st.lists(text, min_size=1, max_size=3)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_equals_torchmetrics_squad(pairs):
    squad = pytest.importorskip("torchmetrics.text").SQuAD()
    ours = ExactMatch()
    for i, (said, targets) in enumerate(pairs):
        ours.update(str(i), said, targets)
        squad.update(
            [{"prediction_text": said, "id": str(i)}],
            [{"answers": {"answer_start": [0] * len(targets), "text": targets}, "id": str(i)}],
        )
    assert 100 * ours.compute(n=10).value == pytest.approx(float(squad.compute()["exact_match"]), abs=1e-3)


@given(st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_text_matches_itself_and_normalising_twice_changes_nothing_more(said):
    metric = ExactMatch()
    metric.update("a", said, said)
    assert metric.compute(n=1).value == 1.0
    assert " ".join(normalise(said).split()) == normalise(said)


def test_no_reference_is_refused():
    with pytest.raises(DataError, match="no reference"):
        ExactMatch().update("a", "x", [])
