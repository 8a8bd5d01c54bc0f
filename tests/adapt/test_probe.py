"""Heads on frozen encoders: against scikit-learn, saved and loaded, and through a recipe with images and one with texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import write_jsonl
from residency import bases, embedded, recipe, run
from residency.adapt.probe import Probe
from residency.classifier import ClassHead, Classifier
from residency.errors import DataError, PlanError


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = [str(i % 4) for i in range(120)]
    centres = rng.standard_normal((4, 7)) * 1.2
    return np.array([centres[int(c)] + rng.standard_normal(7) for c in labels], np.float32), labels


def test_linear_head_equals_scikit_learn(data):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = data
    penalty = 0.03
    head = Probe(regularisation=penalty).fit(features, labels)
    z = (features - features.mean(0)) / features.std(0)
    theirs = linear_model.LogisticRegression(C=1 / (penalty * len(labels)), tol=1e-8, max_iter=5000).fit(z, labels)
    mine = head(torch.tensor(features)).exp().numpy()
    np.testing.assert_allclose(mine, theirs.predict_proba(z), atol=2e-4)


def test_half_precision_features_and_other_widths(data):
    features, labels = data
    for kind in ("linear", "prototype"):
        head = Probe(head=kind).fit(features.astype(np.float16), labels)
        assert len(head.predict(features[:3])) == 3
    one = Probe().fit(features[:, :1], labels)
    assert one.weight.shape == (4, 1)


def test_one_row_per_class_is_enough_for_prototypes(data):
    features, labels = data
    head = Probe(head="prototype").fit(features[:4], labels[:4])
    assert head.predict(features[:4]) == labels[:4]


def test_saved_and_loaded_head_predicts_the_same(tmp_path):
    folder = embedded.base_folder("tiny-text-encoder")
    from residency import encoders

    texts = [f"{'good' if i % 2 else 'bad'} {i}" for i in range(20)]
    labels = ["pos" if i % 2 else "neg" for i in range(20)]
    encoder = encoders.load(folder)
    head = Probe().fit(encoder.encode(texts), labels)
    head.save(folder, tmp_path / "model")
    assert bases.facts(tmp_path / "model").kind == "classifier"
    again = Classifier(tmp_path / "model")
    assert list(again.predict(texts, batch=7)) == head.predict(encoder.encode(texts))
    with pytest.raises(DataError, match="no classifier"):
        ClassHead.load(folder)


IMAGES = """\
residency: 1
name: pictures
base: tiny-image-encoder
task: {examples: embedded:digits/examples, test: embedded:digits/test, metric: macro-f1}
limit: {examples: 80, test: 60}
steps:
  - tune: {method: probe}
  - evaluate: {speed: false}
"""


def test_a_recipe_with_images_runs_to_its_report(tmp_path):
    pytest.importorskip("sklearn")
    record = run.execute(recipe.parse(IMAGES, tmp_path / "recipe.yaml"), tmp_path / "run")
    base, tuned = record["exams"]
    assert base["task"] is None  # an encoder without a head has nothing to answer with
    assert tuned["task"]["n"] == 60
    assert tuned["task"]["low"] <= tuned["task"]["value"] <= tuned["task"]["high"]
    assert tuned["task"]["value"] > 0.15  # ten classes, random convolutions
    assert any(f["kind"] == "heatmap" for f in tuned["figures"])
    assert next(iter(record["task"]["items"].values()))["image"].startswith("data:image/png")
    assert (tmp_path / "run" / "report.html").exists()


def test_a_recipe_with_texts_and_a_guard(tmp_path):
    rows = [
        {"id": f"t{i}", "text": f"{'lovely' if i % 2 else 'dreadful'} place {i}", "label": "pos" if i % 2 else "neg"}
        for i in range(60)
    ]
    write_jsonl(tmp_path / "a.jsonl", rows[:30])
    write_jsonl(tmp_path / "b.jsonl", rows[30:50])
    write_jsonl(tmp_path / "c.jsonl", rows[50:])
    text = (
        IMAGES.replace("tiny-image-encoder", "tiny-text-encoder")
        .replace("embedded:digits/examples", "a.jsonl")
        .replace("embedded:digits/test", "b.jsonl")
    )
    text = text.replace("limit:", "guard: {test: c.jsonl, metric: exact-match}\nlimit:")
    record = run.execute(recipe.parse(text, tmp_path / "recipe.yaml"), tmp_path / "run")
    assert record["exams"][-1]["guard"]["n"] == 10


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("metric: macro-f1", "metric: rouge-l", "a classifier cannot|which `rouge-l` cannot score"),
        ("tiny-image-encoder", "tiny-llama", "needs a text-encoder or image-encoder"),
    ],
)
def test_what_a_probe_cannot_do_is_refused_by_the_plan(tmp_path, old, new, says):
    from residency import plan

    pytest.importorskip("sklearn")
    with pytest.raises(PlanError, match=says):
        plan.make(recipe.parse(IMAGES.replace(old, new), tmp_path / "recipe.yaml"))
