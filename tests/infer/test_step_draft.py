"""The recipe step `draft`: keys, plan, a run whose model is untouched and whose draft is found, and a killed one."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import subprocess
import sys

import pytest
import torch

from helpers import qa, write_jsonl
from residency import bases, catalog, decoding, embedded, plan, recipe, run, store
from residency.chat import Chat
from residency.errors import DataError, PlanError
from residency.evaluate.cost import measure_speed
from residency.infer.drafted import Drafted
from residency.infer.step_draft import Draft, DraftParams
from residency.infer.tree import DynamicTree
from residency.progress import Progress
from residency.report.figures import describe, draw
from residency.step import Job, State

QUICK = {"max-steps": 4, "batch": 4, "new-tokens": 8, "measure": 1, "vocabulary": 200, "precision": "float32"}


def job(tmp_path, name="out", rows=9, seed=0):
    folder = embedded.base_folder("tiny-llama")
    data = write_jsonl(tmp_path / "rows.jsonl", [qa(i) for i in range(rows)])
    for part in (name, f"{name}-scratch"):
        (tmp_path / part).mkdir()
    return Job(
        model=folder, rows=data, examples=data, test=data, guard=None, out=tmp_path / name,
        scratch=tmp_path / f"{name}-scratch", seed=seed, device="cpu", read=None, base=None, progress=Progress(), task={},
    )  # fmt: skip


def step(**keys):
    return Draft(DraftParams.model_validate({key.replace("_", "-"): value for key, value in keys.items()}))


def state(**changes):
    return State(model=dataclasses.replace(bases.facts(embedded.base_folder("tiny-llama")), **changes), rows=80)


def test_keys():
    for keys, message in (
        ({"method": "medusa", "layers": 2}, "medusa has none"),
        ({"text": "rows", "samples": 2}, "`samples` belongs to text: self"),
        ({"text": "rows", "new-tokens": 20}, "`new-tokens` belongs to text: self"),
        ({"method": "eagle"}, "clover"),
        ({"least": 1.0}, "less than 1"),
        ({"tree": "static"}, "Extra inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            DraftParams.model_validate(keys)
    assert DraftParams().sizes() == {"heads": 4, "layers": 2}
    assert DraftParams(method="clover").sizes() == {"heads": 4, "layers": 1}
    assert all(field.description for field in DraftParams.model_fields.values())


def test_plan():
    before = state()
    forecast = step().plan(before)
    assert forecast.after.model == before.model
    assert "beside" in forecast.notes[0]
    assert step(method="medusa").plan(before).flops < forecast.flops
    assert step(text="rows").plan(before).flops < forecast.flops
    with pytest.raises(PlanError, match="needs a causal-lm"):
        step().plan(state(kind="classifier"))
    with pytest.raises(PlanError, match="cannot be drafted for: a GPT2LMHeadModel has no final norm"):
        step().plan(state(architecture="GPT2LMHeadModel"))
    assert DraftParams().least == DynamicTree().least == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding window of 4,096"),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"architectures": ["PhiForCausalLM"]}, "a PhiForCausalLM has no final norm"),
        ({"architectures": ["Phi3ForCausalLM"], "sliding_window": None}, None),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32768, "use_sliding_window": False}, None),
        ({"architectures": ["LlamaForCausalLM"], "attn_logit_softcapping": 50.0}, None),  # only eviction minds
    ],
)
@pytest.mark.parametrize("method", ["clover-2", "medusa"])
def test_plan_reads_the_config(tmp_path, method, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = state(architecture=config["architectures"][0], tokenizer_folder=str(tmp_path))
    if message is None:
        step(method=method).plan(before)
        return
    with pytest.raises(PlanError, match=message):
        step(method=method).plan(before)


def test_planning_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from residency.infer.step_draft import Draft, DraftParams;"
        "from residency.step import *; Draft(DraftParams()).plan(State(ModelFacts('causal-lm', 'LlamaForCausalLM', 1, 1), 1))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", ["clover-2", "clover", "medusa"])
def test_a_run_leaves_the_model_and_puts_a_draft_beside_it(tmp_path, method):
    given = job(tmp_path)
    outcome = step(**QUICK, method=method, samples=2).run(given)
    model = given.out / outcome.gives["model"]
    assert (model / "model.safetensors").read_bytes() == (given.model / "model.safetensors").read_bytes()
    assert outcome.summary["texts"] == 16  # eight rows, two answers each; the ninth's question is held out
    assert outcome.summary["draft_vocabulary"] == 200
    assert outcome.measured["same_answers"] == "1 of 1"
    for figure in (*outcome.figures, *outcome.measured["figures"]):
        assert figure["kind"] == "table" or (describe(figure) and draw(figure)["data"])
    assert decoding.has_draft(model)
    assert store.read_json(model / "draft" / "config.json")["method"] == method
    assert not (model / store.MANIFEST).exists()  # of the embedded base
    chat = Chat.open(model, max_tokens=12)
    assert isinstance(chat.options["custom_generate"], Drafted)
    with_draft = "".join(chat.ask("What is a permit?"))
    assert chat.options["custom_generate"].stats.steps
    plain = Chat.open(given.model, max_tokens=12)
    assert with_draft == "".join(plain.ask("What is a permit?"))
    speed = measure_speed(chat.model, [1, 2, 3], 4, 1, **chat.options)
    assert speed.tokens_per_second > 0


def test_the_rows_own_answers_train_too(tmp_path):
    keys = {k: v for k, v in QUICK.items() if k != "new-tokens"} | {"text": "rows", "vocabulary": None}
    outcome = step(**keys).run(job(tmp_path))
    assert outcome.summary["texts"] == 8
    assert outcome.summary["draft_vocabulary"] == bases.facts(embedded.base_folder("tiny-llama")).vocabulary


def test_texts_survive_a_kill_and_seeds_count(tmp_path, monkeypatch):
    first = job(tmp_path, "first")
    step(**QUICK).run(first)
    killed = job(tmp_path, "killed")
    monkeypatch.setattr("residency.infer.draftcost.compare", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        step(**QUICK).run(killed)
    monkeypatch.undo()
    from residency.infer import selftext

    original, skipped = selftext.answers, []
    monkeypatch.setattr(selftext, "answers", lambda *a, **k: skipped.append(k["skip"]) or original(*a, **k))
    step(**QUICK).run(killed)
    assert skipped == [1]  # the one batch there is was not written anew
    weights = [bases_of(j) for j in (first, killed)]
    assert weights[0] == weights[1]
    monkeypatch.undo()
    other = job(tmp_path, "other", seed=1)
    step(**QUICK).run(other)
    assert bases_of(other) != weights[0]


def bases_of(job):
    return (job.out / "model" / "draft" / "model.safetensors").read_bytes()


def test_no_rows_and_silent_models_are_said(tmp_path, monkeypatch):
    given = job(tmp_path)
    monkeypatch.setattr("residency.infer.selftext.answers", lambda *a, **k: iter([[(i, []) for i in range(8)]]))
    with pytest.raises(DataError, match="too short to learn from"):
        step(**QUICK).run(given)
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        step(**QUICK).run(job(tmp_path, "empty", rows=0))


def test_in_a_recipe(project):
    """Planned, run, resumed; a step that would lose the draft is refused."""
    text = project.read_text()
    head = text[: text.index("steps:")]
    project.write_text(
        head + "steps:\n  - tune: {method: lora, rank: 2, max-steps: 2, batch: 4}\n"
        "  - draft: {max-steps: 2, batch: 4, new-tokens: 4, measure: 1, vocabulary: 100}\n"
        "  - evaluate: {speed: true, new-tokens: 3, resamples: 200}\n"
    )
    read = recipe.load(project)
    record = run.execute(read, project.parent / "out", report=True)
    assert record["status"] == "done"
    final = run.final_model(project.parent / "out")
    assert decoding.has_draft(final)
    assert run.execute(read, project.parent / "out")["time"]["computed"] == []
    scores = {exam["id"]: exam["task"]["value"] for exam in record["exams"]}
    assert scores["02-draft"] == scores["01-tune"]  # the same weights
    project.write_text(
        head + "steps:\n  - draft: {max-steps: 2}\n  - tune: {method: lora, rank: 2, max-steps: 2, batch: 4}\n"
    )
    with pytest.raises(PlanError, match="what `draft` puts beside this one would be lost"):
        plan.make(recipe.load(project))


def test_the_catalogue_knows_the_methods():
    for name in ("clover-2", "clover", "medusa", "prompt-lookup"):
        assert catalog.method(name).load()


def test_answers_end_where_the_model_ends(tmp_path):
    from residency.infer.selftext import answers

    folder = embedded.base_folder("tiny-llama")
    model, tokenizer = bases.load_causal_lm(folder), bases.load_tokenizer(folder)
    prompts = [[5, 6, 7], [8], [9, 10]]
    settings = {"new_tokens": 10, "pad": tokenizer.pad_token_id, "ends": []}
    state = torch.random.get_rng_state()
    batches = list(answers(model, prompts, batch=2, samples=2, **settings))
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    for n in range(4):  # writing can go on after any batch
        assert list(answers(model, prompts, batch=2, samples=2, skip=n, **settings)) == batches[n:]
    found = dict(batches[0] + batches[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    for i, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert found[i] == alone[0, len(prompt) :].tolist()
    ended = dict(
        functools.reduce(operator.iadd, answers(model, prompts, batch=2, **settings | {"ends": [found[0][3]]}), [])
    )
    assert ended[0] == found[0][: found[0].index(found[0][3]) + 1]
