"""The recipe step of label prompts: with everything, with nothing, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from promptmodels import rows

from helpers import write_jsonl
from residency import plan, recipe, run
from residency.adapt.step_label_prompts import LabelPromptsParams, together
from residency.embedded import base_folder
from residency.errors import PlanError

RECIPE = """\
residency: 1
name: aspects
base: tiny-text-encoder
task: {examples: shots.jsonl, test: test.jsonl, metric: multilabel-f1}
steps:
  - tune: {method: label-prompts%s}
  - evaluate: {speed: false, resamples: 100}
"""


@pytest.fixture
def aspects(tmp_path):
    """Shots and tests of two topics, episodes of the two others, descriptions, unlabelled rows."""
    texts, labels = rows(200)
    both = [
        {"id": f"r{i}", "text": f"{t} {i}", "labels": list(own)}
        for i, (t, own) in enumerate(zip(texts, labels, strict=True))
    ]
    wanted = [r for r in both if set(r["labels"]) <= {"decor", "price"}]
    write_jsonl(tmp_path / "shots.jsonl", wanted[:10])
    write_jsonl(tmp_path / "test.jsonl", wanted[10:30])
    write_jsonl(
        tmp_path / "pool.jsonl", [{"id": r["id"], "text": r["text"]} if i % 2 else r for i, r in enumerate(wanted[30:])]
    )
    write_jsonl(tmp_path / "others.jsonl", [r for r in both if set(r["labels"]) <= {"staff", "food_food"}])
    write_jsonl(tmp_path / "said.jsonl", [{"text": "Walls and lamps.", "label": "decor"}])

    def make(keys=""):
        return recipe.parse(RECIPE % keys, tmp_path / "recipe.yaml")

    return make


def test_a_recipe_with_everything_runs_to_its_report(aspects, tmp_path):
    keys = (
        ", episodes: others.jsonl, tasks: 4, ways: 2, shots: 2, queries: 1, descriptions: said.jsonl, "
        "unlabelled: pool.jsonl, self-training: {rounds: 2}"
    )
    record = run.execute(aspects(keys), tmp_path / "run")
    step, exam = record["steps"][0], record["exams"][-1]
    assert step["summary"]["optimiser_steps"] == 4
    assert step["summary"]["described"] == 1
    assert step["summary"]["pseudo_labelled"] > 0
    titles = [f["title"] for f in step["figures"]]
    assert titles[:2] == ["Training loss", "Self-training"]
    assert len(titles) == 5
    assert exam["task"]["n"] == 20
    assert exam["task"]["low"] <= exam["task"]["value"] <= exam["task"]["high"]
    assert any(f["title"].startswith("Labels given") for f in exam["figures"])
    assert (tmp_path / "run" / "report.html").exists()
    folder = run.final_model(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    assert config["residency_prompted"]["facts"]["decor"] == {"text": "Walls and lamps.", "source": "given"}


def test_a_recipe_without_training_keeps_the_encoder(aspects, tmp_path):
    run.execute(aspects(", form: plain"), tmp_path / "run")
    from safetensors.torch import load_file

    after = load_file(run.final_model(tmp_path / "run") / "model.safetensors")
    before = load_file(base_folder("tiny-text-encoder") / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_rehearsal_is_small(aspects):
    step = aspects(", episodes: others.jsonl").steps[0].step
    assert step.tiny().params.tasks == 3


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (", epochs: 2", "epochs belongs to training"),
        (", unlabelled: pool.jsonl", "belong together"),
        (", form: plain, template: '{text}'", "belongs to form"),
        (", self-training: {round: 1}", "round"),
        (", decide: 1.5", "decide"),
    ],
)
def test_keys_that_nothing_would_read_are_refused(aspects, keys, says):
    from residency.errors import RecipeError

    with pytest.raises(RecipeError, match=says):
        aspects(keys)


def test_what_cannot_work_is_refused_by_the_plan(aspects, tmp_path):
    text = RECIPE % ""
    for old, new, says in (
        ("multilabel-f1", "macro-f1", "use metric: multilabel-f1"),
        ("tiny-text-encoder", "tiny-llama", "needs a text-encoder|cannot be scored"),
        ("label-prompts", "label-prompts, max-tokens: 900", "512 positions"),
    ):
        with pytest.raises(PlanError, match=says):
            plan.make(recipe.parse(text.replace(old, new), tmp_path / "recipe.yaml"))
    with pytest.raises(PlanError, match="cannot score|cannot be scored|use metric"):
        plan.make(recipe.parse(text.replace("label-prompts", "probe"), tmp_path / "recipe.yaml"))


def test_confusion_of_labels():
    said = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0]], bool)
    gold = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)
    assert together(said, gold).tolist() == [[1, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]]


def test_parameters_are_documented_and_round_trip():
    params = LabelPromptsParams(episodes="x.jsonl", form="prompt")
    assert LabelPromptsParams.model_validate_json(params.model_dump_json(by_alias=True)) == params
    assert all(field.description for field in LabelPromptsParams.model_fields.values())
