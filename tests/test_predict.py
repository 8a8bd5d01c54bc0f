"""`residency predict`: what a classifier is for, from the shell."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers import write_jsonl
from residency import encoders, recipe, rows, run
from residency.errors import PlanError
from residency.predict import Labeller

RECIPE = """\
residency: 1
name: labels
base: {base}
task: {{examples: examples.jsonl, test: test.jsonl, metric: macro-f1}}
steps:
  - tune: {{method: probe}}
  - evaluate: {{speed: false, resamples: 100}}
"""
CLI = [sys.executable, "-m", "residency", "predict"]


def residency(*arguments, cwd, stdin=None):
    done = subprocess.run([*CLI, *arguments], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    made = [
        {"id": f"r{i}", "text": ("12 34 " if i % 2 else "ab cd ") * (i + 1), "label": "no" if i % 2 else "yes"}
        for i in range(8)
    ]
    write_jsonl(folder / "examples.jsonl", made[:6])
    write_jsonl(folder / "test.jsonl", made[6:])
    (folder / "recipe.yaml").write_text(RECIPE.format(base="tiny-text-encoder"))
    run.execute(recipe.load(folder / "recipe.yaml"), folder / "run")
    return folder


def test_texts_from_arguments_a_pipe_and_a_file(texts):
    expected = list(Labeller.open(texts / "run").label(["ab cd ab cd", "12 34 12 34"]))
    assert expected == ["yes", "no"]
    code, out, _ = residency("run", "ab cd ab cd", "12 34 12 34", cwd=texts)
    assert (code, out) == (0, "yes\tab cd ab cd\nno\t12 34 12 34\n")
    code, out, _ = residency("run", "--json", cwd=texts, stdin="ab cd ab cd\n\n12 34 12 34\n")
    assert [json.loads(line)["label"] for line in out.splitlines()] == expected
    write_jsonl(
        texts / "new.jsonl", [{"id": "a", "text": "ab cd"}, {"wrong": 1}, {"id": "b", "text": "12", "label": "x"}]
    )
    code, out, err = residency("run", "--file", "new.jsonl", cwd=texts)
    assert code == 0
    assert [line.split("\t")[1] for line in out.splitlines()] == ["a", "b"]
    assert "new.jsonl:2: skipped" in err


def test_images_by_path(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    made = []
    for i in range(6):
        name = f"{i}.png"
        pil.new("RGB", (8, 8), (250, 20 + i, 0) if i % 2 else (0, 20 + i, 250)).save(tmp_path / name)
        made.append({"id": name, "image": name, "label": "red" if i % 2 else "blue"})
    write_jsonl(tmp_path / "examples.jsonl", made[:4])
    write_jsonl(tmp_path / "test.jsonl", made[4:])
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base="tiny-image-encoder"))
    run.execute(recipe.load(tmp_path / "recipe.yaml"), tmp_path / "run")
    code, out, _ = residency("run", "1.png", "2.png", cwd=tmp_path)
    assert (code, out) == (0, "red\t1.png\nblue\t2.png\n")
    code, out, err = residency("run", "none.png", cwd=tmp_path)
    assert code == 4
    assert "none.png" in err


def test_a_language_model_is_sent_to_chat(tmp_path):
    from residency import embedded

    with pytest.raises(PlanError, match="residency chat"):
        Labeller.open(embedded.base_folder("tiny-llama"))


def test_items_of_rows_without_labels():
    found = [r for r in rows.stream([{"text": "hello"}], labelled=False) if isinstance(r, rows.Row)]
    assert encoders.item_of(found[0]) == "hello"
    assert isinstance(next(iter(rows.stream([{"text": "hello"}]))), rows.Refused)
