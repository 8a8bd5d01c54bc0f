"""A run survives what happens to runs: kills, Ctrl-C, damage, a second process, changed keys; and its record is true."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT, qa, write_jsonl
from residency import recipe, rows, run, store
from residency.errors import DataError, PlanError, StoreError

CLI = [sys.executable, "-m", "residency"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The small recipe, run once; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("finished")
    from helpers import TINY_RECIPE

    data = folder / "data"
    data.mkdir()
    write_jsonl(data / "examples.jsonl", [qa(i) for i in range(8)])
    write_jsonl(data / "test.jsonl", [qa(i) for i in range(100, 108)])
    write_jsonl(data / "guard.jsonl", [qa(i, "river") for i in range(200, 206)])
    write_jsonl(data / "pool.jsonl", [qa(i) for i in range(20, 40)] + [qa(i, "music") for i in range(20, 40)])
    (folder / "recipe.yaml").write_text(TINY_RECIPE)
    record = run.execute(recipe.load(folder / "recipe.yaml"), folder / "run")
    return folder, record


@pytest.fixture
def copy(finished, tmp_path):
    folder, record = finished
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", record


def again(folder):
    return run.execute(recipe.load(folder / "recipe.yaml"), folder / "run")


def final_weights(root):
    return (run.final_model(root) / "model.safetensors").read_bytes()


def test_the_record_tells_the_whole_story(finished):
    folder, record = finished
    assert record["status"] == "done"
    assert [s["id"] for s in record["steps"]] == ["01-curate", "02-tune", "03-distill"]
    assert [e["id"] for e in record["exams"]] == ["00-base", "02-tune", "03-distill"]
    assert [(c["of"], c["against"]) for c in record["comparisons"]] == [
        ("02-tune", "00-base"),
        ("03-distill", "00-base"),
        ("03-distill", "02-tune"),
    ]
    for exam in record["exams"]:
        assert exam["task"]["low"] <= exam["task"]["value"] <= exam["task"]["high"]
        assert exam["task"]["n"] == 8
        assert exam["guard"]["n"] == 6
        assert exam["cost"]["parameters"] > 0
        assert exam["measured"]["tokens_per_second"] > 0
        assert exam["measured"]["process_peak_bytes"] > exam["measured"]["peak_memory_bytes"] >= 0
    base, tuned, student = record["exams"]
    assert student["cost"]["parameters"] < tuned["cost"]["parameters"] == base["cost"]["parameters"]
    assert student["cost"]["kv_bytes_per_token"] < base["cost"]["kv_bytes_per_token"]
    assert set(record["task"]["items"]) == {f"permit-{i}" for i in range(100, 108)}
    assert record == json.loads((folder / "run" / "run.json").read_text()) | {"time": record["time"]}
    kept = rows.read(
        store.RunStore(folder / "run").folder("01-curate", record["steps"][0]["address"]) / "rows.jsonl"
    ).rows
    assert len(kept) == 8 + 12
    assert (folder / "run" / "report.html").stat().st_size > 100_000
    assert "distill · 3 layers, BiLD" in (folder / "run" / "report.md").read_text()


def test_the_report_is_a_function_of_the_record(copy):
    folder, _ = copy
    before = (folder / "run" / "report.html").read_text()
    (folder / "run" / "report.html").unlink()
    run.write_report(folder / "run", run.load_record(folder / "run"))
    assert (folder / "run" / "report.html").read_text() == before


def test_the_model_given_is_standard_and_the_one_examined(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, record = finished
    model = AutoModelForCausalLM.from_pretrained(run.final_model(folder / "run"))
    AutoTokenizer.from_pretrained(run.final_model(folder / "run"))
    assert model.config.num_hidden_layers == 3
    assert sum(p.numel() for p in model.parameters()) == record["exams"][-1]["cost"]["parameters"]


def test_a_finished_recipe_computes_nothing(copy):
    folder, record = copy
    before = {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*") if p.is_file() and p.name not in (".lock",)}
    second = again(folder)
    assert second["time"]["computed"] == []
    assert store.timeless(second) == store.timeless(record)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_second_run_takes_under_five_seconds_from_the_shell(copy):
    """The best of three: on a shared machine a single start may wait for its neighbours."""
    folder, _ = copy
    took = []
    while len(took) < 3 and min(took, default=5.0) >= 5:
        start = time.monotonic()
        out = subprocess.run(
            [*CLI, "run", str(folder / "recipe.yaml"), "--out", str(folder / "run"), "--json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        took.append(time.monotonic() - start)
        assert json.loads(out)["computed"] == []
    assert min(took) < 5


def test_planning_imports_no_torch(copy):
    """Or a second run would take seconds to say that nothing is to be done."""
    folder, _ = copy
    text = (folder / "recipe.yaml").read_text()
    more = "  - merge-heads: {kv-heads: 1, train: false}\n  - sparsify: {max-steps: 2}\n  - evaluate:"
    (folder / "recipe.yaml").write_text(text.replace("  - evaluate:", more))
    code = "import sys; from residency import plan, recipe; plan.make(recipe.load(sys.argv[1])); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(folder / "recipe.yaml")], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("old", "new", "computed"),
    [
        ("calibrate: 4", "calibrate: 5", ["03-distill", "03-distill.exam"]),
        ("layers: 3", "layers: 2", ["03-distill", "03-distill.exam"]),
        ("new-tokens: 2", "new-tokens: 3", ["00-base.exam", "02-tune.exam", "03-distill.exam"]),
        ("name: small", "name: small\ndescription: changed", []),
    ],
)
def test_changing_a_key_recomputes_its_step_and_what_follows(copy, old, new, computed):
    folder, _ = copy
    file = folder / "recipe.yaml"
    file.write_text(file.read_text().replace(old, new))
    record = again(folder)
    assert record["time"]["computed"] == computed
    assert len(list((folder / "run").glob("run.????????.json"))) == 1  # the record before is kept under its own name


def test_changed_data_recompute_what_read_them(copy):
    folder, record = copy
    pool = folder / "data" / "pool.jsonl"
    pool.write_text(pool.read_text() + json.dumps(qa(41)) + "\n")
    assert again(folder)["time"]["computed"][0] == "01-curate"


def test_twenty_kills_end_in_the_same_weights_and_record(finished, tmp_path):
    """kill -9 at 20 random moments: the last resume has the weights of the uninterrupted run, bit for bit, and its record."""
    folder, record = finished
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    root = tmp_path / "copy" / "run"
    out = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "nursery.py"),
            str(tmp_path / "copy" / "recipe.yaml"),
            str(root),
            "20",
            "0",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert json.loads(out.stdout)["kills"] == 20
    assert not list(root.rglob(".tmp-*"))
    once = tmp_path / "once"
    subprocess.run(
        [*CLI, "run", str(tmp_path / "copy" / "recipe.yaml"), "--out", str(once), "-q"],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert final_weights(root) == final_weights(once)
    assert store.timeless(run.load_record(root)) == store.timeless(run.load_record(once))


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: _cut(f / "model" / "model.safetensors"),
        lambda f: (f / store.MANIFEST).write_text('{"files": {}'),
        lambda f: (f / "record.json").unlink(),
    ],
    ids=["truncated checkpoint", "corrupted manifest", "missing record"],
)
def test_a_damaged_step_is_set_aside_and_computed_again(copy, harm, capsys):
    from residency.progress import PlainProgress

    folder, record = copy
    root = folder / "run"
    before = final_weights(root)
    harm(store.RunStore(root).folder("02-tune", record["steps"][1]["address"]))
    second = run.execute(recipe.load(folder / "recipe.yaml"), root, progress=PlainProgress())
    assert second["time"]["computed"] == ["02-tune"]
    assert "02-tune: damaged (" in capsys.readouterr().err
    assert len(list((root / "steps").glob("02-tune*.damaged-*"))) == 1
    assert final_weights(root) == before
    assert store.timeless(second) == store.timeless(record)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def test_ctrl_c_leaves_a_record_and_the_next_run_goes_on(copy):
    folder, record = copy
    shutil.rmtree(folder / "run")
    process = subprocess.Popen(
        [*CLI, "run", str(folder / "recipe.yaml"), "--out", str(folder / "run")],
        stderr=subprocess.PIPE,
        text=True,
        # a background job of a shell starts with SIGINT ignored, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stderr:
        if line.startswith("02-tune: tune"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "Ctrl-C" in rest
    assert "Traceback" not in rest
    stopped = run.load_record(folder / "run")
    assert stopped["status"] == "interrupted"
    assert [s["id"] for s in stopped["steps"]] == ["01-curate"]
    done = again(folder)
    assert done["time"]["computed"][0] == "02-tune"
    assert store.timeless(done) == store.timeless(record)


def test_two_runs_of_one_recipe_at_once(copy):
    folder, _ = copy
    with store.RunStore(folder / "run").locked():
        out = subprocess.run(
            [*CLI, "run", str(folder / "recipe.yaml"), "--out", str(folder / "run")], capture_output=True, text=True
        )
    assert out.returncode == StoreError.exit_code
    assert f"in use by process {os.getpid()}" in out.stderr
    assert "Traceback" not in out.stderr


def test_a_full_disk_in_the_middle_of_a_step(copy, monkeypatch):
    """The disk fills while the tuned model is written: a clear message, no half step, and the next run goes on."""
    folder, record = copy
    shutil.rmtree(folder / "run")
    from residency import bases

    good = bases.save

    def full(*args, **kwargs):
        good(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bases, "save", full)
    with pytest.raises(StoreError, match="no space left"):
        again(folder)
    failed = run.load_record(folder / "run")
    assert failed["status"] == "failed"
    assert "no space left" in failed["error"]
    assert sorted(p.name.split("-")[0] for p in (folder / "run" / "steps").iterdir()) == ["00", "00", "01"]
    monkeypatch.undo()
    assert store.timeless(again(folder)) == store.timeless(record)


def test_test_questions_never_reach_the_training(copy):
    """A held-out question hidden in the examples and the pool is refused with the row it repeats, case and spacing aside."""
    folder, _ = copy
    stolen = qa(100)
    for name in ("pool", "examples"):
        file = folder / "data" / f"{name}.jsonl"
        file.write_text(
            file.read_text()
            + json.dumps(
                {"id": f"stolen-{name}", "instruction": "  " + stolen["instruction"].upper(), "output": "other words"}
            )
            + "\n"
        )
    record = again(folder)
    refusals = [json.loads(line) for line in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [r["node"] for r in refusals] == ["00-data", "01-curate"]
    assert all("same question as the held-out row permit-100" in r["reason"] for r in refusals)
    assert record["quarantine"]["count"] == 2


def test_inputs_are_never_modified(copy):
    folder, _ = copy
    before = store.hash_tree(folder / "data")
    shutil.rmtree(folder / "run")
    again(folder)
    assert store.hash_tree(folder / "data") == before


@pytest.mark.parametrize(
    ("old", "new", "error", "says"),
    [
        ("base: tiny-llama", "base: tiny-lama", "RecipeError", "did you mean `tiny-llama`"),
        ("base: tiny-llama", "base: tiny-text-encoder", "PlanError", "needs a causal-lm"),
        ("layers: 3", "layers: 4", "PlanError", "the model has 4"),
        ("data/pool.jsonl", "data/poool.jsonl", "DataError", "there is no file"),
        ("data/pool.jsonl", "../pool.jsonl", "RecipeError", "leaves the recipe's folder"),
        ("data/pool.jsonl", "embedded:construction-faq/pol", "RecipeError", "did you mean `construction-faq/pool`"),
        (
            "guard: {test: data/guard.jsonl, metric: choice-accuracy, name: rivers}",
            "guard: general-knowlege",
            "RecipeError",
            "did you mean `general-knowledge`",
        ),
        ("  - evaluate:", "  - tune: {max-steps: 1}\n  - evaluate: {}\n  - evaluate:", "PlanError", "once and last"),
        ("rank: 2,", "rank: 2, targets: [q_prj],", "PlanError", "did you mean `q_proj`"),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(copy, old, new, error, says):
    folder, _ = copy
    file = folder / "recipe.yaml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(Exception, match=says) as caught:
        again(folder)
    assert type(caught.value).__name__ == error


def test_a_student_with_another_vocabulary_is_refused_before_weights_load(copy, monkeypatch):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from residency import bases

    folder, _ = copy
    other = folder / "other"
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(other)
    file = folder / "recipe.yaml"
    file.write_text(file.read_text().replace("student: {layers: 3, calibrate: 4}", "student: {base: other}"))
    monkeypatch.setattr(bases, "load_causal_lm", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(PlanError, match=r"different vocabularies \(259 and 97") as error:
        again(folder)
    assert "recipe.yaml:" in str(error.value)


def test_a_pool_without_a_usable_row(copy):
    folder, _ = copy
    (folder / "data" / "pool.jsonl").write_text('{"broken\n')
    with pytest.raises(DataError, match="none of its 1 rows can be used"):
        again(folder)


def test_a_newer_record_is_not_misread(copy):
    folder, _ = copy
    file = folder / "run" / "run.json"
    store.write_json(file, json.loads(file.read_text()) | {"schema": 99})
    with pytest.raises(StoreError, match="upgrade"):
        run.load_record(folder / "run")


def test_no_pickle_in_what_a_run_leaves(finished):
    folder, _ = finished
    suffixes = {p.suffix for p in (folder / "run").rglob("*") if p.is_file()}
    assert not suffixes & {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


def test_trusted_rows_in_the_pool_do_not_spend_the_budget_and_ids_may_collide(copy):
    folder, _ = copy
    pool = folder / "data" / "pool.jsonl"
    same, other = qa(0), qa(60) | {"id": "permit-1"}
    pool.write_text("".join(json.dumps(r) + "\n" for r in (same, other)) + pool.read_text())
    record = again(folder)
    assert record["steps"][0]["summary"]["kept"] == 12
    assert record["steps"][1]["summary"]["rows"] == 8 + 12
    reasons = [json.loads(line)["reason"] for line in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert reasons == ["the same row as permit-0, which is there in any case"]


def test_long_rows_that_the_recipe_allows_reach_every_step(copy):
    """A row above the default limit is not lost between steps: the training itself refuses it, by tokens, and says so."""
    folder, _ = copy
    file = folder / "recipe.yaml"
    file.write_text(file.read_text().replace("name: small", "name: small\nmax-chars: 100000"))
    examples = folder / "data" / "examples.jsonl"
    row = {"id": "long", "instruction": "long?", "output": "y" * 40_000}
    examples.write_text(examples.read_text() + json.dumps(row) + "\n")
    again(folder)
    refused = [json.loads(line) for line in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {r["node"] for r in refused} == {"02-tune", "03-distill"}
    assert all("tokens, at most 512" in r["reason"] for r in refused)


def test_examples_that_stand_in_the_guard_are_refused(copy):
    folder, _ = copy
    examples = folder / "data" / "examples.jsonl"
    examples.write_text(examples.read_text() + json.dumps(qa(200, "river") | {"id": "stolen"}) + "\n")
    assert again(folder)["data"]["examples"]["refused"] == 1


def test_a_finished_run_without_its_report_gets_it_back(copy):
    folder, _ = copy
    (folder / "run" / "report.html").unlink()
    assert again(folder)["time"]["computed"] == []
    assert (folder / "run" / "report.html").exists()


def test_an_out_folder_that_is_a_file(copy):
    folder, _ = copy
    (folder / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        run.execute(recipe.load(folder / "recipe.yaml"), folder / "file")


def test_curating_with_an_encoder_that_is_none(copy):
    folder, _ = copy
    file = folder / "recipe.yaml"
    file.write_text(file.read_text().replace("tiny-text-encoder", "tiny-image-encoder"))
    with pytest.raises(PlanError, match="needs a text-encoder"):
        again(folder)
