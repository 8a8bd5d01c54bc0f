"""Every command from the shell's point of view: output, exit codes, and no traceback for what a user did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, qa, write_jsonl
from residency import catalog, cli, recipe, run


def residency(*arguments, cwd=None, stdin=None):
    """In this process, through the same entry point, so that imports are paid once."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    here = Path.cwd()
    argv, source = sys.argv, sys.stdin
    try:
        os.chdir(cwd or here)
        sys.argv = ["residency", *map(str, arguments)]
        sys.stdin = io.StringIO(stdin or "")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code
    finally:
        os.chdir(here)
        sys.argv, sys.stdin = argv, source
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from helpers import TINY_RECIPE

    folder = tmp_path_factory.mktemp("cli")
    (folder / "data").mkdir()
    write_jsonl(folder / "data/examples.jsonl", [qa(i) for i in range(8)])
    write_jsonl(folder / "data/test.jsonl", [qa(i) for i in range(100, 108)])
    write_jsonl(folder / "data/guard.jsonl", [qa(i, "river") for i in range(200, 206)])
    write_jsonl(folder / "data/pool.jsonl", [qa(i) for i in range(20, 40)])
    (folder / "recipe.yaml").write_text(TINY_RECIPE)
    run.execute(recipe.load(folder / "recipe.yaml"), folder / "runs" / "small")
    return folder


def test_run_says_the_outcome_and_where_the_report_is(done):
    code, out, _ = residency("run", "recipe.yaml", cwd=done)
    assert code == 0
    assert "0 computed, 7 reused" in out
    assert str(Path("runs/small/report.html")) in out


def test_plan_prints_cost_and_exports_and_json(done):
    code, out, _ = residency("plan", "recipe.yaml", cwd=done)
    assert code == 0
    assert "03-distill" in out
    assert "GiB" in out
    assert "export --to hf: yes" in out
    code, out, _ = residency("plan", "recipe.yaml", "--json", cwd=done)
    plan = json.loads(out)
    assert [n["node"] for n in plan["nodes"]] == [
        "00-data",
        "00-base.exam",
        "01-curate",
        "02-tune",
        "02-tune.exam",
        "03-distill",
        "03-distill.exam",
    ]
    assert plan["total"]["seconds"] > 0


def test_report_is_drawn_again(done):
    (done / "runs/small/report.html").unlink()
    code, out, _ = residency("report", "runs/small", cwd=done)
    assert code == 0
    assert (done / out.strip()).exists()


def test_compare_two_runs(done):
    code, out, _ = residency("compare", "runs/small", "runs/small/run.json", cwd=done)
    assert code == 0
    assert out.count("small") >= 2
    assert residency("compare", "runs/small", cwd=done)[0] == 1


def test_methods_as_json_has_one_object_per_method(done):
    code, out, _ = residency("methods", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [r["name"] for r in rows] == [m.name for m in catalog.METHODS]
    for row in rows:
        assert {"name", "stage", "role", "title", "arxiv", "object", "step", "status", "extras"} <= set(row)
    assert "2406.13555" in residency("methods", "bild")[1]
    code, _, err = residency("methods", "bld")
    assert code == 1
    assert "did you mean `bild`" in err


def test_explain_keys_and_steps():
    assert "r, the rank" in residency("explain", "tune.rank")[1]
    assert "default 16" in residency("explain", "rank")[1]
    assert "calibrate" in residency("explain", "distill.student")[1] or residency("explain", "student.layers")[0] == 0
    assert "near-duplicates" in residency("explain", "curate")[1]
    assert "neighbour" in residency("explain", "knn")[1]
    assert residency("explain", "curate")[1].count("Where rows are measured") == 1
    code, _, err = residency("explain", "tune.rnk")
    assert code == 2
    assert "did you mean `tune.rank`" in err


def test_every_recipe_key_can_be_explained():
    from residency.explain import sections

    for path, model in sections().items():
        for name, field in model.model_fields.items():
            assert field.description, f"{path}.{name} has no sentence"
            assert residency("explain", field.alias or name)[0] == 0


def test_preview_marks_the_trained_tokens(done):
    code, out, _ = residency("preview", "recipe.yaml", "--rows", "1", cwd=done)
    assert code == 0
    assert "⟦T⟧⟦h⟧⟦e⟧" in out
    assert "What is the rule 0" in out


def test_doctor_lists_versions_and_embedded():
    code, out, _ = residency("doctor", "--json")
    found = json.loads(out)
    assert code == (5 if found["problems"] else 0)
    assert "torch" in found["facts"]["core"]
    assert "smollm2-135m-instruct" in found["facts"]["embedded"]


def test_chat_answers_from_a_pipe(done):
    code, out, _ = residency("chat", "runs/small", "--max-tokens", "3", "-p", "hello", cwd=done)
    assert code == 0
    code, out, _ = residency("chat", "runs/small", "--base", "--max-tokens", "3", cwd=done, stdin="one\n\ntwo\n")
    assert code == 0
    assert len(out.splitlines()) >= 2


def test_export_hf_prints_parity_and_never_overwrites(done):
    code, out, _ = residency("export", "runs/small", "--to", "hf", "--out", "exported", cwd=done)
    assert code == 0
    assert "logits parity" in out
    assert "largest difference 0.00e+00" in out
    code, _, err = residency("export", "runs/small", "--to", "hf", "--out", "exported", cwd=done)
    assert code == 7
    assert "overwrite" in err
    assert residency("export", "runs/small", "--to", "hf", "--out", "exported", "--overwrite", cwd=done)[0] == 0
    code, _, err = residency("export", "runs/small", "--to", "tflite", cwd=done)
    assert code == 7
    assert "tflite" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "none.yaml"], 2, "no such recipe"),
        (["run", "demoo"], 2, "did you mean `demo`"),
        (["report", "nowhere"], 6, "no such file"),
        (["chat", "nowhere"], 6, "no such file"),
        (["frobnicate"], 2, "frobnicate"),
        (["run"], 2, "RECIPE"),
        (["run", "recipe.yaml", "--frob"], 2, "--frob"),
    ],
)
def test_mistakes_have_exit_codes_and_no_traceback(done, arguments, code, says):
    found, _, err = residency(*arguments, cwd=done)
    assert found == code
    assert says.lower() in err.lower()
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_misspelt_key_from_the_shell(done):
    """The one path a user meets first, through a real process."""
    (done / "bad.yaml").write_text((done / "recipe.yaml").read_text().replace("rank: 2", "rnk: 2"))
    out = subprocess.run(
        [sys.executable, "-m", "residency", "run", "bad.yaml"], capture_output=True, text=True, cwd=done
    )
    assert out.returncode == 2
    assert out.stderr.startswith("error: bad.yaml:8:26: unknown key `rnk`; did you mean `rank`?")


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "recipes").glob("*.yaml"))])
@pytest.mark.embedded
def test_every_shipped_recipe_runs_in_its_tiny_form(name, tmp_path):
    code, out, err = residency("run", name, "--tiny", "--out", tmp_path / "run", "-q")
    assert code == 0, err
    record = run.load_record(tmp_path / "run")
    assert record["status"] == "done"
    assert len(record["exams"]) >= 2
    assert (tmp_path / "run" / "report.html").exists()
