"""From rows to a classifier of label sets: held-out scores by brute force, thresholds, folders, self-training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from promptmodels import FORMS, TOPICS, encoder, method, rows, scores_of, task_of, wordpiece
from torch.testing import assert_close

from residency import bases, classifier, multilabel, prompted
from residency.adapt import fitprompts
from residency.adapt.labelprompts import calibrated, fixed_threshold
from residency.adapt.selftraining import SelfTraining
from residency.embedded import base_folder
from residency.errors import DataError
from residency.labeltemplates import Prompter, collate_marked
from residency.prompted import PromptedClassifier


@pytest.fixture(name="wordpiece", scope="module")
def _wordpiece():
    return wordpiece()


@pytest.fixture(name="encoder", scope="module")
def _encoder():
    return encoder()


def test_fixed_thresholds():
    assert (fixed_threshold(5, "softmax"), fixed_threshold(10, "softmax")) == (0.3, 0.2)
    found = [fixed_threshold(n, "softmax") for n in range(2, 60)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 0.5
    assert fixed_threshold(7, "sigmoid") == 0.5


@pytest.fixture(scope="module")
def fitted(encoder, wordpiece):
    texts, labels = rows(24, seed=3)
    way = method("attention", loss="bce", eta=0.3)
    return fitprompts.fit(
        way.view(encoder), wordpiece, way, texts, labels, classes=sorted(TOPICS), descriptions={"staff": "waiter rude"}
    ), texts, labels  # fmt: skip


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_left_out_scores_are_those_of_a_classifier_without_the_row(eta, encoder, wordpiece):
    texts, labels = rows(20, seed=5)
    texts.append("the lamp")
    labels.append(("lonely",))
    classes = sorted({*TOPICS, "lonely"})
    way = method("attention", eta=eta, focus=0 if eta == 0 else 2)
    found = fitprompts.fit(way.view(encoder), wordpiece, way, texts, labels, classes=classes)
    assert len(found.scores) == (21 if eta else 20)  # without a vector of its own a label cannot lose its only row
    for r in range(20):
        rest = [i for i in range(21) if i != r]
        fewer = fitprompts.fit(
            way.view(encoder), wordpiece, way, [texts[i] for i in rest], [labels[i] for i in rest], classes=classes
        )
        assert_close(fewer.classifier.scores([texts[r]])[0], found.scores[r], rtol=1e-4, atol=1e-5)


def test_the_threshold_is_the_best_on_held_out_rows(fitted):
    found, _, _ = fitted
    head = found.classifier.head
    f1 = [
        multilabel.macro_f1(multilabel.decide(found.scores, t, least_one=True), found.checked)
        for t in np.unique(found.scores)
    ]
    assert multilabel.macro_f1(found.said, found.checked) == pytest.approx(max(f1))
    assert found.curve[1].max() == pytest.approx(max(f1))
    assert calibrated(np.zeros((0, 5)), np.zeros((0, 5), bool), "softmax")[0] == 0.3
    assert head.least_one


def test_saved_and_loaded_it_says_the_same(fitted, tmp_path):
    found, texts, _ = fitted
    found.classifier.save(tmp_path / "model")
    assert bases.facts(tmp_path / "model").kind == "classifier"
    again = classifier.load(tmp_path / "model")
    assert isinstance(again, PromptedClassifier)
    assert_close(again.scores(texts, batch=5), found.classifier.scores(texts), rtol=1e-4, atol=1e-6)
    said = list(again.predict(texts, batch=7))
    assert said == list(found.classifier.predict(texts))
    expected = multilabel.decide(found.classifier.scores(texts), found.classifier.head.threshold, least_one=True)
    assert [multilabel.split(s) for s in said] == [
        frozenset(c for c, y in zip(again.classes, row, strict=True) if y) for row in expected
    ]
    assert list(again.predict([])) == []
    assert again.scores([]).shape == (0, 4)
    with pytest.raises(DataError, match="read texts"):
        list(again.predict([np.zeros((2, 2))]))
    with pytest.raises(DataError, match="holds no label prompts"):
        prompted.load(base_folder("tiny-text-encoder"))


@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_scores_as_its_episodes_do(form, encoder, wordpiece):
    """One episode's support as the shots: its queries get the very scores of training."""
    z = scores_of(form, encoder, wordpiece)
    _, e, texts = task_of(form, wordpiece)
    way = method(form)
    shots = [(texts[i], c) for c, row in zip(e.classes, e.support, strict=True) for i in row]
    found = fitprompts.fit(
        way.view(encoder), wordpiece, way, [t for t, _ in shots], [(c,) for _, c in shots],
        classes=e.classes, descriptions={"staff": "waiter kind rude"},
    )  # fmt: skip
    scores = found.classifier.scores([texts[i] for i in e.query])
    assert_close(torch.from_numpy(scores), z.softmax(-1), rtol=1e-3, atol=1e-5)


def test_self_training_adds_shots(fitted):
    found, texts, labels = fitted
    more, truth = rows(40, seed=8)
    before = found.classifier.head.prototypes.clone()
    again, record = fitprompts.self_trained(found, SelfTraining(rounds=2), more, truth=truth)
    taken = [i for i, label in enumerate(record.labels) if label is not None]
    assert taken
    assert_close(found.classifier.head.prototypes, before)  # the old classifier is left alone
    joined = fitprompts.fit(
        found.classifier.view, found.classifier.tokenizer, found.method, [*texts, *(more[i] for i in taken)],
        [*labels, *(sorted(record.labels[i]) for i in taken)], classes=again.classifier.classes,
        descriptions={"staff": "waiter rude"},
    )  # fmt: skip
    assert_close(again.classifier.head.prototypes, joined.classifier.head.prototypes, rtol=1e-4, atol=1e-5)
    assert len(again.scores) == len(texts)  # the threshold trusts the labelled rows only
    nothing, record = fitprompts.self_trained(found, SelfTraining(), [])
    assert_close(nothing.classifier.head.prototypes, before)
    assert record.labels == []


def test_rows_it_cannot_learn_from_are_refused(encoder, wordpiece):
    way = method("plain")
    for texts, labels, says in (([], [], "0 texts"), (["the soup"], [("food_food",)], "no row has the label `staff`")):
        with pytest.raises(DataError, match=says):
            fitprompts.fit(way.view(encoder), wordpiece, way, texts, labels, classes=["food_food", "staff"])


def test_one_label_and_equal_rows(encoder, wordpiece):
    way = method("attention")
    found = fitprompts.fit(
        way.view(encoder), wordpiece, way, ["the soup"] * 3, [("food_food",)] * 3, classes=["food_food"]
    )
    assert list(found.classifier.predict(["the wall"])) == ["food_food"]
    assert np.isfinite(found.scores).all()


def test_rows_without_labels_teach_it_to_say_nothing(encoder, wordpiece):
    texts, labels = rows(16, seed=3)
    way = method("plain", loss="bce", scale=0.01)
    classes = sorted({c for own in labels for c in own})
    found = fitprompts.fit(
        way.view(encoder), wordpiece, way, [*texts, "the bad un"], [*labels, ()], classes=classes, decide=0.999
    )
    assert not found.classifier.head.least_one
    assert list(found.classifier.predict(["the soup"])) == [""]
    assert len(found.scores) == 17
    sure = fitprompts.fit(way.view(encoder), wordpiece, way, texts, labels, classes=classes, decide=0.999)
    assert list(sure.classifier.predict(["the soup"])) != [""]
    assert_close(sure.classifier.head.prototypes, found.classifier.head.prototypes)


def test_padding_has_no_say(encoder, wordpiece):
    prompter = Prompter(wordpiece)
    items = [prompter(t) for t in ("the soup", "the waiter was rude the waiter was kind", "fish")]
    view = method("attention").view(encoder)
    labels = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    together_ = torch.cat([*view.vectors(items, 0, labels)])
    alone = torch.cat([torch.cat([*view.vectors([item], 0, labels)]) for item in items])
    assert_close(together_, alone, rtol=1e-4, atol=1e-5)
    assert collate_marked([], 0)["input_ids"].shape == (0, 1)
