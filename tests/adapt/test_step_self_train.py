"""`self-train` in a recipe: after any head on an encoder, on rows without labels."""

from __future__ import annotations

import json

import numpy as np
import pytest

from helpers import write_jsonl
from residency import classifier, recipe, run
from residency import plan as planning
from residency.errors import PlanError, ResidencyError

RECIPE = """\
residency: 1
name: again
base: tiny-text-encoder
task: {{examples: examples.jsonl, test: test.jsonl, metric: macro-f1}}
steps:
  - tune: {{method: {tune}}}
  - self-train: {{unlabelled: more.jsonl, rounds: 2, share: 0.5}}
  - evaluate: {{speed: false, resamples: 100}}
"""


def texts(n: int, start: int = 0) -> list[dict]:
    """Two classes a byte-level encoder can tell apart: digits and letters."""
    generator = np.random.default_rng(start)
    found = []
    for i in range(start, start + n):
        letters = "0123456789" if i % 2 else "abcdefghij"
        text = "".join(generator.choice(list(letters), 12)) + f" {i}"
        found.append({"id": f"r{i}", "text": text, "label": "number" if i % 2 else "word"})
    return found


def prepared(folder, tune="probe", labelled=True):
    write_jsonl(folder / "examples.jsonl", texts(6))
    write_jsonl(folder / "test.jsonl", texts(20, 100))
    more = texts(30, 200)
    write_jsonl(folder / "more.jsonl", more if labelled else [{k: r[k] for k in ("id", "text")} for r in more])
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(tune=tune))
    return file


@pytest.mark.parametrize("head", ["linear", "prototype"])
def test_it_takes_pseudo_labels_and_says_how_right_they_were(tmp_path, head):
    file = prepared(tmp_path, f"probe, head: {head}")
    record = run.execute(recipe.load(file), tmp_path / "out")
    step = next(s for s in record["steps"] if "self-train" in s["id"])
    assert step["summary"]["unlabelled_rows"] == 30
    assert step["summary"]["pseudo_labels"] == 16  # half of fifteen each, rounded up
    assert 0.5 < step["summary"]["agree_with_their_labels"] <= 1
    folder = next((tmp_path / "out" / "steps").glob("02-self-train-*")) / "model"
    said = list(classifier.load(folder).predict(["0123456789", "abcdefghij"]))
    assert set(said) <= {"number", "word"}
    before = classifier.load(next((tmp_path / "out" / "steps").glob("01-tune-*")) / "model")
    after = classifier.load(folder)
    assert not np.allclose(before.head.weight.numpy(), after.head.weight.numpy())
    assert after.head.unit == before.head.unit


def test_rows_without_labels_are_welcome_there_and_nowhere_else(tmp_path):
    file = prepared(tmp_path, labelled=False)
    record = run.execute(recipe.load(file), tmp_path / "out")
    step = next(s for s in record["steps"] if "self-train" in s["id"])
    assert "agree_with_their_labels" not in step["summary"]
    assert step["summary"]["unlabelled_rows"] == 30
    write_jsonl(tmp_path / "examples.jsonl", [{"text": "no label"}, *texts(6)])
    again = run.execute(recipe.load(file), tmp_path / "again")
    assert json.dumps(again).count("the field `label` is missing") == 1


def test_what_it_cannot_work_on_is_refused_before_anything_runs(tmp_path):
    file = prepared(tmp_path, "classify")
    with pytest.raises(PlanError, match="fine-tuned as one piece"):
        planning.make(recipe.load(file))


def test_no_unlabelled_file_is_an_error_with_its_place(tmp_path):
    file = prepared(tmp_path)
    (tmp_path / "more.jsonl").unlink()
    with pytest.raises(ResidencyError, match=r"more\.jsonl"):
        planning.make(recipe.load(file))


def test_label_sets_have_a_key_of_their_own(tmp_path):
    file = prepared(tmp_path, "label-prompts")
    several = [{"id": f"m{i}", "text": f"text number {i}", "labels": ["a", "b"][: 1 + i % 2]} for i in range(12)]
    write_jsonl(tmp_path / "examples.jsonl", several[:8])
    write_jsonl(tmp_path / "test.jsonl", several[8:])
    file.write_text(file.read_text().replace("macro-f1", "multilabel-f1"))
    with pytest.raises(PlanError, match="one label per row"):
        planning.make(recipe.load(file))
