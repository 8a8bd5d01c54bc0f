"""The step `merge-heads`: refusals before weights load, a forecast that comes true, figures, and every key read."""

import json

import pytest
import torch
import transformers
from torch.testing import assert_close

from helpers import qa, write_jsonl
from residency import bases, errors, rows
from residency.compress.step_merge_heads import MergeHeads, MergeHeadsParams, merged_facts
from residency.progress import Progress
from residency.report import figures
from residency.step import Job, State

SHORT = {"kv-heads": 1, "calibrate": 6, "max-steps": 3, "batch": 4, "max-tokens": 1024, "precision": "float32"}


def step(**keys):
    return MergeHeads(MergeHeadsParams.model_validate(keys))


@pytest.fixture(scope="module")
def base():
    return bases.resolve("tiny-llama")


def run(base, folder, seed=0, **keys):
    folder.mkdir(exist_ok=True, parents=True)
    data = folder / "kept.jsonl"
    rows.write(data, rows.read(write_jsonl(folder / "rows.jsonl", [qa(i) for i in range(12)])).rows)
    paths = dict.fromkeys(("rows", "examples", "test"), data)
    (folder / "out").mkdir()
    job = Job(
        model=base.folder,
        **paths,
        guard=None,
        out=folder / "out",
        scratch=folder / "scratch",
        seed=seed,
        device="cpu",
        read=None,
        base=None,
        progress=Progress(),
        task={},
    )
    return step(**keys).run(job), folder / "out" / "model"


def facts(**changes):
    given = {"kind": "causal-lm", "architecture": "LlamaForCausalLM", "parameters": 10**6, "bytes_on_disk": 4 * 10**6}
    given |= {"layers": 2, "hidden": 32, "heads": 8, "kv_heads": 8, "head_dim": 4, "kv_bytes_per_token": 512}
    from residency.step import ModelFacts

    return ModelFacts(**given | changes)


def test_plans_are_refused_early():
    def plan(kv=1, **changes):
        return step(**{"kv-heads": kv}).plan(State(facts(**changes), rows=10))

    assert plan(2).after.model.kv_bytes_per_token == 128
    for kv in (3, 8, 16):
        with pytest.raises(errors.PlanError, match=r"cannot be merged into") as error:
            plan(kv)
        assert error.value.hint == "kv-heads: 1 or 2 or 4"
    with pytest.raises(errors.PlanError, match="has one already") as error:
        plan(1, kv_heads=1)
    with pytest.raises(errors.PlanError, match="Qwen3.*normalises"):
        plan(architecture="Qwen3ForCausalLM")
    with pytest.raises(errors.PlanError, match="GPT2"):
        plan(architecture="GPT2LMHeadModel")
    with pytest.raises(errors.PlanError, match="needs a causal-lm"):
        plan(kind="text-encoder")


def test_keys_that_would_not_be_read_are_refused():
    for keys, why in (
        ({"gradual": True, "train": False}, "merges during the training"),
        ({"gradual": True, "merge": "fitted"}, "fades into aligned means"),
        ({"train": False, "learning-rate": 1e-3}, "`learning-rate` belongs to the training"),
        ({"train": False, "loss": "bild"}, "`loss` belongs"),
        ({"group-by": "none", "merge": "mean", "criterion": "dist"}, "would not be read"),
        ({"merge": "procrustes", "horizon": 100}, "`horizon` belongs"),
        ({"no-such": 1}, "no-such"),
        ({"kv-heads": 0}, "kv-heads"),
    ):
        with pytest.raises(ValueError, match=why):
            MergeHeadsParams.model_validate({"kv-heads": 1} | keys)
    assert all(f.description for f in MergeHeadsParams.model_fields.values())
    given = MergeHeadsParams.model_validate(SHORT)
    assert MergeHeadsParams.model_validate_json(given.model_dump_json(by_alias=True)) == given


@pytest.mark.parametrize(
    "keys", [{"merge": "fitted"}, {"gradual": True, "max-steps": 6}, {"train": False, "merge": "procrustes"}]
)
def test_a_run_keeps_the_promise_of_its_plan(keys, base, tmp_path):
    given = SHORT | keys
    if not given.get("train", True):
        given = {k: v for k, v in given.items() if k in ("kv-heads", "calibrate", "max-tokens", *keys)}
    forecast = step(**given).plan(State(base.facts, rows=12)).after.model
    outcome, folder = run(base, tmp_path, **given)
    found = bases.facts(folder)
    for name in ("parameters", "kv_heads", "kv_bytes_per_token", "heads", "head_dim"):
        assert getattr(found, name) == getattr(forecast, name), name
    assert abs(found.bytes_on_disk / forecast.bytes_on_disk - 1) < 0.1
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_key_value_heads == 1
    assert outcome.gives == {"model": "model"}
    assert json.loads(json.dumps(outcome.figures)) == outcome.figures
    for spec in outcome.figures:
        assert figures.draw(spec) if spec["kind"] != "table" else spec["rows"]
    kinds = [spec["kind"] for spec in outcome.figures]
    assert kinds == ["heatmap"] * 2 + ["table"] + ["lines"] * given.get("train", True)
    assert ("loss_last" in outcome.summary) == given.get("train", True)


def test_auto_takes_the_least_loss(base, tmp_path):
    outcome, folder = run(base, tmp_path, **{"kv-heads": 1, "calibrate": 8, "max-tokens": 1024, "train": False})
    table = next(spec for spec in outcome.figures if spec["kind"] == "table")
    losses = {name: loss for name, loss, _ in table["rows"]}
    assert set(losses) == {"unmerged", "mean", "procrustes", "lowrank", "fitted"} | {
        f"procrustes, norms of {kind} restored" for kind in ("keys", "values", "both")
    }
    del losses["unmerged"]
    assert outcome.summary["merge"] == min(losses, key=losses.get)
    assert [name for name, _, chosen in table["rows"] if chosen] == [outcome.summary["merge"]]


def test_every_way_leaves_another_model_and_the_seed_the_same(base, tmp_path):
    made = {}
    for name, keys in {
        "mean": {"merge": "mean"},
        "procrustes": {"merge": "procrustes"},
        "lowrank": {"merge": "lowrank"},
        "fitted": {"merge": "fitted"},
        "horizon": {"merge": "fitted", "horizon": 1},
        "again": {"merge": "fitted"},
    }.items():
        _, folder = run(
            base, tmp_path / name, **{"kv-heads": 1, "calibrate": 5, "max-tokens": 1024, "train": False} | keys
        )
        made[name] = bases.load_causal_lm(folder).state_dict()
    keys = list(made["mean"])
    for name, other in (
        ("mean", "procrustes"),
        ("procrustes", "lowrank"),
        ("lowrank", "fitted"),
        ("fitted", "horizon"),
    ):
        assert any(not torch.equal(made[name][k], made[other][k]) for k in keys)
    for k in keys:
        assert_close(made["fitted"][k], made["again"][k], rtol=0, atol=0)


def test_facts_of_a_biased_family():
    size = {
        "vocab_size": 9,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }

    def count(kv_heads):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**size, num_key_value_heads=kv_heads))
        return sum(p.numel() for p in model.parameters())

    known = {"parameters": count(4), "hidden": 16, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 4}
    before = facts(architecture="Qwen2ForCausalLM", **known)
    assert merged_facts(before, 2).parameters == count(2)
    assert merged_facts(before, 1).parameters == count(1)
    assert merged_facts(before, 4) == before


def test_one_row_is_enough_and_none_is_an_error(base, tmp_path):
    outcome, _ = run(base, tmp_path / "one", **{"kv-heads": 1, "calibrate": 1, "max-tokens": 1024, "train": False})
    assert outcome.summary["merge"]
    with pytest.raises(errors.DataError, match="no rows to calibrate on"):
        run(base, tmp_path / "none", **{"kv-heads": 1, "max-tokens": 8, "train": False})


def test_rehearsals_are_small():
    tiny = step(**{"kv-heads": 4, "merge": "fitted"}).tiny()
    assert tiny.params.kv_heads == 1
    assert tiny.params.max_steps == 4
    assert tiny.params.merge == "fitted"
    assert "merge heads" in tiny.title
