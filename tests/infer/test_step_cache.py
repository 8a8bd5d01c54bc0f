"""The recipe step: its keys, its plan, and a run that leaves the weights alone and says how to hold their cache."""

import dataclasses
import json
import random

import pytest
import torch
import transformers

from helpers import qa, write_jsonl
from residency import bases, embedded, rows
from residency.errors import DataError, PlanError
from residency.infer.cachecost import answer_loss, continuation_loss, documents, savings
from residency.infer.citrus import Citrus, from_json
from residency.infer.evicting import Evicting
from residency.infer.eviction import Full, Streaming
from residency.infer.step_cache import Cache, CacheParams
from residency.progress import Progress
from residency.report.figures import describe, draw
from residency.step import Job, State

QUICK = {"rows": 2, "context": 600, "budget": 96, "chunk": 48, "compressions": [4, 12]}


def job(tmp_path, name="out", count=12):
    data = write_jsonl(tmp_path / "rows.jsonl", [qa(i) for i in range(count)])
    for part in (name, f"{name}-scratch"):
        (tmp_path / part).mkdir()
    return Job(
        model=embedded.base_folder("tiny-llama"), rows=data, examples=data, test=data, guard=None, out=tmp_path / name,
        scratch=tmp_path / f"{name}-scratch", seed=0, device="cpu", read=None, base=None, progress=Progress(), task={},
    )  # fmt: skip


def step(**keys):
    return Cache(CacheParams.model_validate({key.replace("_", "-"): value for key, value in keys.items()}))


def state(**changes):
    facts = dataclasses.replace(bases.facts(embedded.base_folder("tiny-llama")), **changes)
    return State(model=facts, rows=80)


def tiny():
    folder = embedded.base_folder("tiny-llama")
    return bases.load_causal_lm(folder), bases.load_tokenizer(folder)


# ------------------------------------------------------------------ keys and plan


def test_keys_that_contradict_each_other_are_refused():
    for keys, message in (
        ({"method": "tova", "mode": "shared"}, "belongs to method: citrus"),
        ({"sinks": 4}, "belongs to method: streaming"),
        ({"method": "streaming", "sinks": 8, "budget": 8}, "leave nothing"),
        ({"bounded": True}, "judges by a question"),
        ({"method": "snapkv", "bounded": True}, "judges by a question"),
        ({"compressions": [1]}, "at least 2"),
        ({"budget": 4}, "greater than or equal to 8"),
        ({"size": 4}, "Extra inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            CacheParams.model_validate(keys)
    given = CacheParams()
    assert CacheParams.model_validate_json(given.model_dump_json(by_alias=True)) == given
    assert all(field.description for field in CacheParams.model_fields.values())


def test_settings_are_what_the_decoder_reads():
    for keys in (
        {}, {"mode": "individual"}, {"method": "streaming", "sinks": 2, "bounded": True}, {"method": "streaming"}, {"method": "h2o"},
        {"method": "tova", "bounded": True}, {"method": "snapkv", "window": 9}, {"budget": 100, "chunk": 10},
    ):  # fmt: skip
        params = CacheParams.model_validate(keys)
        decoder = from_json(json.loads(json.dumps(params.settings())))
        assert (decoder.budget, decoder.chunk, decoder.window, decoder.bounded) == (
            params.budget, params.chunk, params.window, params.bounded,
        )  # fmt: skip
        if isinstance(decoder, Citrus):
            assert decoder.mode == (params.mode or "shared")
        if isinstance(decoder.policy, Streaming):
            assert decoder.policy.sinks == (4 if params.sinks is None else params.sinks)


def test_plan_says_how_much_memory_at_most():
    before = state(kv_bytes_per_token=1 << 20)
    forecast = step().plan(before)
    assert forecast.after.model == before.model
    assert "at most 1,344 MiB of keys and values (1,344 entries)" in forecast.notes[0]
    assert "2,688 MiB" in step(mode="individual").plan(before).notes[0]
    assert "grow with its length" in step(method="snapkv").plan(before).notes[0]
    assert step(rows=1).plan(before).flops < forecast.flops
    assert step(compressions=[2]).plan(before).flops < forecast.flops


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"kind": "text-encoder"}, "causal-lm"), ({"architecture": "GPT2LMHeadModel"}, "rotary"), ({"architecture": "BloomForCausalLM"}, "rotary")],
)  # fmt: skip
def test_plan_refuses_what_cannot_be_evicted_from(changes, message):
    with pytest.raises(PlanError, match=message):
        step().plan(state(**changes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"sliding_window": 4096}, "sliding window of 4,096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "dynamic"),
        ({"attn_logit_softcapping": 50.0}, "capped"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"rope_parameters": {"rope_type": "llama3"}}, None),
        ({"text_config": {"sliding_window": None}}, None),
    ],
)
def test_plan_reads_the_config(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = state(tokenizer_folder=str(tmp_path))
    if message is None:
        step().plan(before)
        return
    with pytest.raises(PlanError, match=message):
        step().plan(before)


def test_the_config_of_another_architecture_says_nothing(tmp_path):
    """A distilled student may carry its teacher's tokenizer, and with it the teacher's folder."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"], "sliding_window": 64}))
    step().plan(state(tokenizer_folder=str(tmp_path)))
    with pytest.raises(PlanError, match="window"):
        step().plan(state(tokenizer_folder=str(tmp_path), architecture="MistralForCausalLM"))


def test_planning_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torch'] = None; from residency.infer.step_cache import Cache, CacheParams;"
        "from residency.step import *; Cache(CacheParams()).plan(State(ModelFacts('causal-lm', 'LlamaForCausalLM', 1, 1), 1))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------ documents and losses


def test_documents_hold_the_answer_where_they_say(tmp_path):
    _, tokenizer = tiny()
    data = rows.load(write_jsonl(tmp_path / "rows.jsonl", [qa(i) for i in range(20)]))
    found = documents(data, tokenizer, 4, 900, 0)
    assert [d.depth for d in found] == [0.125, 0.375, 0.625, 0.875]
    assert len({d.instruction for d in found}) == 4
    for d in found:
        text, asked, answer = (tokenizer.decode(part) for part in (d.context, d.instruction, d.answer))
        row = next(r for r in data if r.prompt in asked)
        assert answer.startswith(row.answer)
        assert asked.startswith(row.prompt)
        assert 500 < len(d.context) <= 900 + 60
        assert text.index(row.answer) / len(text) == pytest.approx(d.depth, abs=0.12)
        assert text.count(row.prompt) == 1
    assert documents(data, tokenizer, 4, 900, 0) == found
    assert documents(data, tokenizer, 4, 900, 1) != found
    with pytest.raises(DataError, match="at least 2"):
        documents(data[:1], tokenizer, 4, 900, 0)


def test_loss_behind_the_full_cache_is_transformers_own():
    model, tokenizer = tiny()
    data = [
        rows.Row(**{"id": str(i), "messages": (("user", qa(i)["instruction"]), ("assistant", qa(i)["output"]))})
        for i in range(9)
    ]
    for document in documents(data, tokenizer, 2, 400, 0):
        ids = torch.tensor([document.context + document.instruction + document.answer])
        labels = ids.clone()
        labels[:, : -len(document.answer)] = -100
        with torch.no_grad():
            expected = float(model(ids, labels=labels).loss)
        assert answer_loss(model, Evicting(Full()), document) == pytest.approx(expected, abs=1e-4)
        assert answer_loss(model, Citrus(len(document.context), 32), document) == pytest.approx(expected, abs=1e-4)
        short = Citrus(8, 8).prefill(model, ids[:, :3], instruction_tokens=3)
        assert continuation_loss(model, short, [1, 2, 3], [4, 5]) > 0


def test_a_broken_promise_is_reported():
    model, tokenizer = tiny()
    data = [
        rows.Row(**{"id": str(i), "messages": (("user", qa(i)["instruction"]), ("assistant", qa(i)["output"]))})
        for i in range(9)
    ]
    document = documents(data, tokenizer, 1, 400, 0)[0]
    decoder = Citrus(64, 32)
    cost = savings(model, decoder, document, (64, decoder.entries(len(document.instruction))), tokens=2)
    assert cost.entries == 64
    with pytest.raises(ValueError, match="holds 64 entries"):
        savings(model, decoder, document, (63, 1000), tokens=2)


# ------------------------------------------------------------------ runs


def test_a_run_leaves_the_weights_and_says_how_to_hold_their_cache(tmp_path):
    work = job(tmp_path)
    outcome = step(**QUICK).run(work)
    folder = work.out / outcome.gives["model"]
    for file in work.model.iterdir():
        if file.name != "manifest.json":
            assert (folder / file.name).read_bytes() == file.read_bytes()
    assert not (folder / "manifest.json").exists()
    settings = json.loads((folder / "cache.json").read_text())
    assert settings == {"method": "citrus", "budget": 96, "chunk": 48, "window": 64, "mode": "shared"}
    assert outcome.summary["entries"] == 96
    facts = bases.facts(folder)
    per_entry = facts.kv_bytes_per_token * 4 // (2 if bases.saved_dtype(folder) == "bfloat16" else 4)
    assert outcome.summary["bytes"] <= per_entry * (96 + 2 * 48 + 200)
    assert outcome.summary["bytes"] < outcome.summary["bytes_full"]
    assert outcome.summary["loss_full"] > 0
    assert outcome.measured["prefill_seconds"]["citrus"] > 0
    assert {figure["kind"] for figure in outcome.figures} == {"lines", "heatmap"}
    for figure in outcome.figures:
        assert draw(figure)["data"]
        assert describe(figure)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    random.seed(0)
    ids = torch.tensor([[random.randrange(3, 200) for _ in range(400)]])
    out = model.generate(ids, custom_generate=from_json(settings), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] <= 403
    second = job(tmp_path, "second")  # the step after another cache step replaces its settings, and only its own
    second = dataclasses.replace(second, model=folder)
    step(**QUICK | {"method": "streaming"}).run(second)
    assert json.loads((folder / "cache.json").read_text()) == settings
    assert json.loads((second.out / "model" / "cache.json").read_text())["method"] == "streaming"


def test_the_same_run_twice_is_the_same_and_every_method_runs(tmp_path):
    seen = {}
    for name, keys in {
        "one": {}, "two": {}, "standard": {"mode": "standard"}, "individual": {"mode": "individual"}, "h2o": {"method": "h2o"},
        "tova": {"method": "tova"}, "snapkv": {"method": "snapkv"}, "streaming": {"method": "streaming"},
        "sinks": {"method": "streaming", "sinks": 30}, "budget": {"budget": 48}, "chunk": {"chunk": 16}, "context": {"context": 200},
    }.items():  # fmt: skip
        outcome = step(
            **QUICK | {"compressions": [6], "rows": 1, "context": 300, "budget": 64, "chunk": 32} | keys
        ).run(job(tmp_path, name))
        seen[name] = json.dumps([outcome.summary, outcome.figures])
    assert seen["one"] == seen["two"]
    assert len(set(seen.values())) == len(seen) - 1


def test_the_tiny_form():
    tiny_step = step(rows=9, context=5000).tiny()
    assert (tiny_step.params.rows, tiny_step.params.context, tiny_step.params.compressions) == (1, 96, (2,))
    assert tiny_step.method == "citrus"
    assert step(method="streaming").method == "streaming-llm"
    assert "citrus, shared, 768 entries" in step().title
