"""The recipe step `distill`: every kind of student, what it refuses, and what it reports."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import qa, write_jsonl
from residency import bases, embedded, plan, recipe, run
from residency.compress import step_distill
from residency.compress.step_distill import DistillParams, make_loss
from residency.errors import PlanError, RecipeError

RECIPE = """\
residency: 1
name: small
base: {base}
task: {{examples: data/examples.jsonl, test: data/test.jsonl, metric: {metric}}}
steps:
{steps}
  - evaluate: {{speed: false, resamples: 100}}
"""
TRAIN = "max-steps: 3, batch: 4, learning-rate: 1e-3, precision: float32"


def write(folder, *steps, base="tiny-llama", metric="bits-per-byte", examples=None, test=None):
    (folder / "data").mkdir(exist_ok=True)
    write_jsonl(folder / "data/examples.jsonl", examples or [qa(i) for i in range(12)])
    write_jsonl(folder / "data/test.jsonl", test or [qa(i) for i in range(100, 106)])
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(base=base, metric=metric, steps="\n".join(f"  - {s}" for s in steps)))
    return recipe.load(file)


def execute(folder, *steps, **given):
    record = run.execute(write(folder, *steps, **given), folder / "run")
    return record, run.final_model(folder / "run")


def test_a_narrower_and_shallower_student_from_a_cached_teacher(tmp_path):
    student = "{layers: 3, choose: even, hidden: 24, heads: 2, kv-heads: 1, ffn: 40, calibrate: 4}"
    record, folder = execute(
        tmp_path, f"distill: {{student: {student}, loss: kl, teacher-cache: hidden, epochs: 2, {TRAIN}}}"
    )
    step = record["steps"][0]
    model = bases.load_causal_lm(folder)
    config = model.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (24, 2, 1)
    assert (config.intermediate_size, config.num_hidden_layers) == (40, 3)
    facts = plan.make(recipe.load(tmp_path / "recipe.yaml")).nodes[-2].forecast.after.model
    assert facts.parameters == pytest.approx(model.num_parameters(), rel=1e-3)
    assert facts.kv_bytes_per_token == bases.facts(folder).kv_bytes_per_token
    assert step["summary"]["teacher_cache_bytes"] > 0
    before, after = step["summary"]["overlap_at_8"].split(" → ")
    assert 0 <= float(before) <= 1
    assert 0 <= float(after) <= 1
    titles = [figure["title"] for figure in step["figures"]]
    assert "Divergence from the teacher along the answer" in titles
    assert "Measured importance that the student keeps" in titles


def test_cached_and_live_teachers_train_the_same_student(tmp_path):
    """To rounding: the cache was filled with other padding than the training has."""
    found = {}
    for cache in ("none", "hidden"):
        folder = tmp_path / cache
        folder.mkdir()
        _, model = execute(
            folder, f"distill: {{student: {{layers: 3, choose: even}}, teacher-cache: {cache}, {TRAIN}}}"
        )
        found[cache] = bases.load_causal_lm(model).state_dict()
    for name, tensor in found["none"].items():
        torch.testing.assert_close(found["hidden"][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_top_k_cache_serves_kl_and_refuses_the_others(tmp_path):
    keys = f"teacher-cache: top-k, teacher-words: 20, {TRAIN}"
    record, _ = execute(tmp_path, f"distill: {{student: {{layers: 2, choose: even}}, loss: kl, {keys}}}")
    assert record["status"] == "done"
    with pytest.raises(PlanError, match="top-k cache"):
        plan.make(write(tmp_path, f"distill: {{student: {{layers: 2}}, loss: bild, {keys}}}"))


def save_stranger(folder, merges, rows=None):
    """A tiny model with a tokenizer of merged bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    known = bases.load_tokenizer(embedded.base_folder("tiny-llama"))
    tokens = dict(sorted(known.get_vocab().items(), key=lambda item: item[1]))
    for a, b in merges:
        tokens[a + b] = len(tokens)
    inner = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = known.chat_template
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=rows or len(tokens),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_padded_and_extended_students_share_the_first_words(tmp_path):
    save_stranger(tmp_path / "padded", [], 320)
    record, _ = execute(tmp_path, f"distill: {{student: {{base: padded}}, loss: kl, {TRAIN}}}")
    assert record["steps"][0]["summary"]["vocabularies"] == "padded vocabularies (259 shared tokens)"
    save_stranger(tmp_path / "extended", [("e", "r")])
    record, _ = execute(tmp_path, f"distill: {{student: {{base: extended}}, loss: bild, {TRAIN}}}")
    assert record["steps"][0]["summary"]["vocabularies"] == "extended vocabularies (259 shared tokens)"


def test_strangers_need_uld_and_get_it(tmp_path):
    save_stranger(tmp_path / "other", [("t", "h"), ("th", "e"), ("i", "s")])
    tokenizer_file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(tokenizer_file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]  # the same words under other ids
    tokenizer_file.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="different vocabularies"):
        plan.make(write(tmp_path, f"distill: {{student: {{base: other}}, loss: kl, {TRAIN}}}"))
    record, _ = execute(tmp_path, f"distill: {{student: {{base: other}}, loss: uld, label-weight: 1, {TRAIN}}}")
    summary = record["steps"][0]["summary"]
    assert summary["vocabularies"] == "different"
    assert summary["aligned_tokens"] > 12


def test_classifiers_are_tuned_and_distilled(tmp_path):
    texts = [{"text": f"{'roof' if i % 2 else 'river'} number {i}", "label": "ab"[i % 2]} for i in range(24)]
    record, folder = execute(
        tmp_path,
        f"tune: {{method: classify, {TRAIN}}}",
        f"distill: {{student: {{base: tiny-text-encoder}}, loss: sinkd, label-weight: 1, {TRAIN}}}",
        base="tiny-text-encoder",
        metric="macro-f1",
        examples=texts[:16],
        test=texts[16:],
    )
    assert [e["id"] for e in record["exams"] if e["task"]] == ["01-tune", "02-distill"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert set(config["label2id"]) == {"a", "b"}
    assert "agreement_with_teacher" in record["steps"][1]["summary"]


def test_regressors_are_tuned_and_distilled(tmp_path):
    texts = [{"text": "wall " * (1 + i % 7) + str(i), "label": str(float(1 + i % 7)), "id": f"t{i}"} for i in range(24)]
    record, folder = execute(
        tmp_path,
        f"tune: {{method: classify, problem: regression, {TRAIN}}}",
        f"distill: {{student: {{base: tiny-text-encoder}}, loss: kl, {TRAIN}}}",
        base="tiny-text-encoder",
        metric="pearson",
        examples=texts[:16],
        test=texts[16:],
    )
    assert all(-1 <= e["task"]["value"] <= 1 for e in record["exams"] if e["task"])
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "regression"


@pytest.mark.parametrize(
    ("tune", "loss", "message"),
    [
        ("probe", "loss: kl", "probe"),
        ("classify", "label-weight: 1", "which loss"),
        ("classify", "loss: kl, rank: 2", "rank"),
        ("classify", "loss: sinkd", "label-weight"),
    ],
)
def test_what_cannot_be_distilled_into_a_classifier_is_refused_by_the_plan(tmp_path, tune, loss, message):
    steps = (f"tune: {{method: {tune}}}", f"distill: {{student: {{base: tiny-text-encoder}}, {loss}}}")
    texts = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(12)]
    with pytest.raises(PlanError, match=message):
        plan.make(
            write(tmp_path, *steps, base="tiny-text-encoder", metric="macro-f1", examples=texts[:8], test=texts[8:])
        )


@pytest.mark.parametrize("loss", ["bild", "normkd"])
def test_losses_that_say_nothing_of_two_classes_are_refused_before_training(tmp_path, loss):
    texts = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(12)]
    with pytest.raises(PlanError, match="classes"):
        execute(
            tmp_path,
            f"tune: {{method: classify, {TRAIN}}}",
            f"distill: {{student: {{base: tiny-text-encoder}}, loss: {loss}, {TRAIN}}}",
            base="tiny-text-encoder",
            metric="macro-f1",
            examples=texts[:8],
            test=texts[8:],
        )


def test_planned_sizes_are_exact_for_untied_heads(tmp_path):
    save_stranger(tmp_path / "untied", [])
    base = bases.facts(tmp_path / "untied")
    assert base.parameters == bases.load_causal_lm(tmp_path / "untied").num_parameters()
    _, folder = execute(
        tmp_path, f"distill: {{student: {{hidden: 8, ffn: 12, calibrate: 4}}, loss: kl, {TRAIN}}}", base="untied"
    )
    planned = plan.make(recipe.load(tmp_path / "recipe.yaml")).nodes[-2].forecast.after.model
    assert planned.parameters == bases.facts(folder).parameters
    assert planned.kv_bytes_per_token == bases.facts(folder).kv_bytes_per_token


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("student: {layers: 9}", "has 4"),
        ("student: {ffn: 20, choose: even}", "layers"),
        ("student: {layers: 2}, loss: kl, teacher-cache: top-k, teacher-words: 400", "vocabulary"),
        ("student: {layers: 4}", "has 4"),
        ("student: {hidden: 32}", "as wide"),
        ("student: {hidden: 33}", "hidden"),
        ("student: {hidden: 30}", "multiple"),
        ("student: {heads: 3}", "share"),
        ("student: {layers: 2, base: tiny-llama}", "either"),
        ("student: {}", "either"),
        ("student: {base: tiny-text-encoder}", "not a causal-lm"),
        ("student: {layers: 2}, loss: bidl", "bild"),
        ("student: {layers: 2}, loss: kl, loss-settings: {temprature: 2}", "temperature"),
        ("student: {layers: 2}, loss: kl, loss-settings: {temperature: 0}", "temperature"),
        ("student: {layers: 2}, loss: bild, loss-settings: {k: 2}", "k"),
        ("student: {layers: 2}, teacher-words: 9", "top-k"),
        ("student: {layers: 2}, loss: sinkd", "label-weight"),
    ],
)
def test_impossible_keys_are_refused_before_anything_is_computed(tmp_path, keys, message):
    with pytest.raises((PlanError, RecipeError), match=message):
        plan.make(write(tmp_path, f"distill: {{{keys}}}"))


@pytest.mark.parametrize("loss", step_distill.LOSSES)
def test_every_loss_trains_a_student(tmp_path, loss):
    if loss == "uld":
        pytest.skip("for different vocabularies; see above")
    weight = "label-weight: 1, " if loss == "sinkd" else ""
    record, _ = execute(tmp_path, f"distill: {{student: {{layers: 2, choose: even}}, loss: {loss}, {weight}{TRAIN}}}")
    assert record["steps"][0]["method"] == loss
    assert record["status"] == "done"


def test_losses_are_made_with_their_settings():
    assert make_loss("bild", {"k": 5, "temperature": 2.0}).params.k == 5
    assert DistillParams.model_validate({"student": {"layers": 3}}).loss == "bild"
