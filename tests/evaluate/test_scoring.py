"""From rows to scores: contexts, wrong answers, one pass."""

from __future__ import annotations

import pytest

from helpers import qa
from residency import bases, embedded, rows
from residency.errors import DataError
from residency.evaluate import scoring


@pytest.fixture(scope="module")
def tiny():
    folder = embedded.base_folder("tiny-llama")
    return bases.load_causal_lm(folder), bases.load_tokenizer(folder)


def test_both_metrics_come_from_one_pass_and_hold_every_item(tiny):
    held = rows.read([qa(i) for i in range(9)]).rows
    found = scoring.by_likelihood(["choice-accuracy", "bits-per-byte"], *tiny, held)
    assert {i["id"] for i in found["choice-accuracy"]["items"]} == {r.id for r in held}
    assert found["bits-per-byte"]["n"] == 9
    again = scoring.by_likelihood(["bits-per-byte"], *tiny, held[::-1])
    assert again["bits-per-byte"]["value"] == pytest.approx(found["bits-per-byte"]["value"], abs=1e-6)


def test_the_unconditional_context_keeps_system_turn_and_history(tiny):
    _, tokenizer = tiny
    row = rows.Row(
        "a", (("system", "SYS"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "x"))
    )
    text = tokenizer.decode(scoring._context(row, tokenizer))
    assert "SYS" in text
    assert "one" in text
    assert "three" not in text


def test_rows_with_their_own_choices_and_mixed_templates(tiny):
    held = rows.read(
        [qa(i) for i in range(5)]
        + [
            {"id": "own", "question": "q?", "answer": "yes", "choices": ["yes", "no"]},
            {"id": "plain", "prompt": "Once", "completion": " upon a time"},
        ]
    ).rows
    found = scoring.by_likelihood(["choice-accuracy"], *tiny, held)
    own = next(i for i in found["choice-accuracy"]["items"] if i["id"] == "own")
    assert own["prediction"] in ("yes", "no")
    with pytest.raises(DataError, match="no wrong answer"):
        scoring.by_likelihood(
            ["choice-accuracy"], *tiny, rows.read([{"question": "q", "answer": "a", "choices": ["a"]}]).rows
        )


def test_the_confusion_matrix_counts(tiny):
    figure = scoring.confusion(["a", "a", "b"], ["a", "b", "b"])
    assert figure["z"] == [[1, 1], [0, 1]]
