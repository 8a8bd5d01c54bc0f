"""The recipe step: its keys, its plan, and a run that ends in a checkpoint anybody can load."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers

from helpers import qa, write_jsonl
from residency import bases, embedded
from residency.compress.fatrelu import loss_and_sparsity
from residency.compress.relufy import install_thresholds, thresholds
from residency.compress.step_sparsify import Sparsify, SparsifyParams
from residency.errors import DataError, PlanError
from residency.progress import Progress
from residency.report.figures import describe, draw
from residency.step import Job, State
from residency.tokens import collate, encode_all

QUICK = {"max-steps": 6, "batch": 4, "calibrate": 4, "precision": "float32"}


def job(tmp_path, name="out", base="tiny-llama", rows=8):
    folder = embedded.base_folder(base) if isinstance(base, str) else base
    data = write_jsonl(tmp_path / "rows.jsonl", [qa(i) for i in range(rows)])
    for part in (name, f"{name}-scratch"):
        (tmp_path / part).mkdir()
    return Job(
        model=folder, rows=data, examples=data, test=data, guard=None, out=tmp_path / name,
        scratch=tmp_path / f"{name}-scratch", seed=0, device="cpu", read=None, base=None, progress=Progress(), task={},
    )  # fmt: skip


def step(**keys):
    return Sparsify(SparsifyParams.model_validate({key.replace("_", "-"): value for key, value in keys.items()}))


def state(**changes):
    facts = dataclasses.replace(bases.facts(embedded.base_folder("tiny-llama")), **changes)
    return State(model=facts, rows=80)


# ------------------------------------------------------------------ keys and plan


def test_keys_that_contradict_each_other_are_refused():
    for keys, message in (
        ({"peaks": [1.0]}, "1 peaks need 2 stages"),
        ({"peaks": [1.0], "stages": [0.5, 0.4]}, "do not fall"),
        ({"peaks": [1.0], "stages": [0.5, 0.9]}, "end with 1"),
        ({"peaks": [2.0, 1.0], "stages": [0.1, 0.5, 1]}, "peaks"),
        ({"peaks": [-1.0], "stages": [0, 1]}, "peaks"),
        ({"threshold": -0.1}, "negative"),
        ({"target": 0.9, "threshold": 0.1}, "leave out"),
        ({"target": 0.9, "tolerance": 0.1}, "leave out"),
        ({"target": 1.0}, "less than 1"),
        ({"threshold": 0.1, "tolerance": 0.1}, "belong to threshold: auto"),
        ({"threshold": 0.1, "per-layer": True}, "belong to threshold: auto"),
        ({"activation": "relu"}, "Extra inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            SparsifyParams.model_validate(keys)
    assert SparsifyParams.model_validate({"peaks": [], "stages": [1]}).peaks == ()
    given = SparsifyParams()
    assert SparsifyParams.model_validate_json(given.model_dump_json(by_alias=True)) == given
    assert all(field.description for field in SparsifyParams.model_fields.values())


def test_plan_says_what_comes_out():
    before = state()
    forecast = step().plan(before)
    assert forecast.after.model.activation == "relu"
    assert forecast.after.model.parameters == before.model.parameters
    assert "silu → ReLU in 4 layers" in forecast.notes[0]
    assert step(loss="cross-entropy").plan(before).flops < forecast.flops
    assert step(max_steps=1).plan(before).flops < forecast.flops
    assert step(threshold=0).plan(before).flops < forecast.flops
    assert forecast.peak_bytes > 4 * 4 * before.model.parameters
    assert step().plan(state(exportable={"hf": None, "gguf": None})).after.model.exportable["gguf"]


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "GPT2LMHeadModel"},
        {"architecture": "Phi3ForCausalLM"},
        {"architecture": "Qwen2MoeForCausalLM"},
        {"architecture": "MixtralForCausalLM"},
        {"kind": "text-encoder"},
    ],
)
def test_plan_refuses_what_cannot_be_made_sparse(changes):
    with pytest.raises(PlanError, match="sparse|causal-lm"):
        step().plan(state(**changes))


# ------------------------------------------------------------------ runs


def test_a_run_ends_in_a_checkpoint_that_everybody_reads(tmp_path):
    work = job(tmp_path)
    outcome = step(**QUICK, target=0.8, learning_rate=1e-3).run(work)
    folder = work.out / outcome.gives["model"]
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    assert max(config["fatrelu_threshold"]) > 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = bases.load_tokenizer(folder)
    from residency import rows

    items, _ = encode_all(rows.load(work.rows), tokenizer, 512)
    batches = [collate(sorted(items[:4], key=len), tokenizer.pad_token_id)]
    relu_loss, relu = loss_and_sparsity(plain, batches)
    assert relu.mean == pytest.approx(outcome.summary["sparsity_before_threshold"], abs=2e-3)
    install_thresholds(plain)
    assert thresholds(plain) == config["fatrelu_threshold"]
    loss, sparse = loss_and_sparsity(plain, batches)
    assert sparse.mean == pytest.approx(outcome.summary["sparsity"], abs=2e-3)
    assert sparse.mean > 0.79
    assert float(outcome.summary["calibration_loss"].split()[-1]) == pytest.approx(loss, abs=2e-3)
    kinds = [figure["kind"] for figure in outcome.figures]
    assert set(kinds) == {"lines", "heatmap"}
    for figure in outcome.figures:
        assert draw(figure)["data"]
        assert describe(figure)
    speeds = outcome.measured["decode_tokens_per_second"]
    assert speeds["dense"] > 0
    assert speeds["sparse"] > 0
    assert not [p for p in Path(folder).iterdir() if p.suffix in (".bin", ".pt")]


@pytest.mark.parametrize("loss", ["kl", "cross-entropy"])
def test_the_same_run_twice_is_the_same(tmp_path, loss):
    outcomes = []
    for name in ("one", "two"):
        work = job(tmp_path, name)
        outcomes.append(step(**QUICK, loss=loss).run(work))
    one, two = outcomes
    assert one.summary == two.summary
    assert one.figures == two.figures
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert a == b


def test_every_key_is_read(tmp_path):
    common = QUICK | {"learning-rate": 5e-3}
    base = {"peaks": [5.0, 20.0], "stages": [0.1, 0.3, 1.0], "threshold": 0.0}
    seen = {}
    for name, keys in {
        "base": base,
        "none": base | {"peaks": [], "stages": [1.0]},
        "higher": base | {"peaks": [5.0, 200.0]},
        "later": base | {"stages": [0.5, 0.7, 1.0]},
        "labels": base | {"loss": "cross-entropy"},
        "threshold": base | {"threshold": 0.05},
    }.items():
        work = job(tmp_path, name)
        outcome = step(**common, **keys).run(work)
        seen[name] = outcome.summary["sparsity"], outcome.summary["loss_last"], outcome.summary["threshold"]
    assert len(set(seen.values())) == len(seen)
    assert seen["higher"][0] > seen["none"][0]
    assert seen["threshold"][0] > seen["base"][0]
    assert seen["threshold"][2] == 0.05


def test_per_layer_thresholds_differ(tmp_path):
    work = job(tmp_path)
    step(**QUICK, target=0.85, per_layer=True).run(work)
    found = json.loads((work.out / "model" / "config.json").read_text())["fatrelu_threshold"]
    assert len(set(found)) == 4


def test_a_sparse_model_can_be_made_sparser(tmp_path):
    first = job(tmp_path, "first")
    step(**QUICK, threshold=0.01).run(first)
    second = job(tmp_path, "second", first.out / "model")
    outcome = step(**QUICK, threshold=0.0).run(second)
    config = json.loads((second.out / "model" / "config.json").read_text())
    assert "fatrelu_threshold" not in config
    assert outcome.summary["sparsity"] > 0.3


def test_the_tiny_form_and_empty_rows(tmp_path):
    tiny = step(peaks=[1.0], stages=[0, 1], max_steps=500).tiny()
    assert tiny.params.max_steps == 4
    assert tiny.params.peaks == (1.0,)
    assert tiny.method == "prosparse"
    assert "penalty up to 1" in tiny.title
    work = job(tmp_path, rows=2)
    with pytest.raises(DataError, match="no rows"):
        step(max_tokens=8).run(work)
    assert len(work.quarantine) == 2
    assert not torch.is_inference_mode_enabled()


def test_the_plans_count_of_candidates_is_the_methods():
    from residency.compress import fatrelu
    from residency.compress.step_sparsify import CANDIDATES

    assert fatrelu.GRID + fatrelu.REFINE + 2 == CANDIDATES
