"""The recipe step: its keys, its plan, and a run that leaves figures and numbers but no model."""

import dataclasses
import json
import subprocess
import sys

import pytest

from helpers import qa, write_jsonl
from residency import bases, embedded, rows
from residency.errors import DataError, PlanError
from residency.evaluate import sinkcosts, sinks
from residency.evaluate.ablate import move_to_first
from residency.evaluate.step_sinks import ARCHITECTURES, Sinks, SinksParams
from residency.progress import Progress
from residency.report.figures import describe, draw
from residency.step import Job, State
from residency.tokens import encode


def job(tmp_path, guard=True, many=6, name="out"):
    examples = write_jsonl(tmp_path / "examples.jsonl", [qa(i) for i in range(many)])
    other = write_jsonl(tmp_path / "guard.jsonl", [qa(i, "river") for i in range(50, 50 + many)])
    for part in (name, f"{name}-scratch"):
        (tmp_path / part).mkdir()
    return Job(
        model=embedded.base_folder("tiny-llama"), rows=examples, examples=examples, test=examples,
        guard=other if guard else None, out=tmp_path / name, scratch=tmp_path / f"{name}-scratch", seed=0, device="cpu",
        read=None, base=None, progress=Progress(), task={},
    )  # fmt: skip


def step(**keys):
    return Sinks(SinksParams.model_validate({key.replace("_", "-"): value for key, value in keys.items()}))


def state(**changes):
    facts = dataclasses.replace(bases.facts(embedded.base_folder("tiny-llama")), **changes)
    return State(model=facts, rows=80, guard_rows=9)


def test_keys():
    for bad in ({"rows": 0}, {"max-tokens": 8}, {"dormant": 1.0}, {"draws": 0}, {"layers": 3}):
        with pytest.raises(ValueError, match="greater|less|Extra"):
            SinksParams.model_validate(bad)
    assert all(field.description for field in SinksParams.model_fields.values())
    given = SinksParams()
    assert SinksParams.model_validate_json(given.model_dump_json(by_alias=True)) == given


def test_plan():
    forecast = step().plan(state())
    assert forecast.after == state()
    assert "2 domains" in forecast.notes[0]
    assert step(rows=4).plan(state()).flops < forecast.flops
    assert step(max_tokens=32).plan(state()).flops < forecast.flops
    assert step(draws=9).plan(state()).flops > forecast.flops
    assert "1 domain:" in step().plan(dataclasses.replace(state(), guard_rows=0)).notes[0]
    for changes in (
        {"architecture": "GPT2LMHeadModel"},
        {"architecture": "MixtralForCausalLM"},
        {"kind": "classifier"},
    ):
        with pytest.raises(PlanError, match="sink probe|causal-lm"):
            step().plan(state(**changes))


def test_plan_knows_the_families_of_the_probe_and_needs_no_torch():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    assert {NAMES[family] for family in sinks.FAMILIES} == set(ARCHITECTURES)
    code = "import sys; import residency.evaluate.step_sinks as s; s.Sinks(s.SinksParams()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_measures_both_domains_and_gives_no_port(tmp_path):
    work = job(tmp_path)
    outcome = step(rows=5, max_tokens=40, draws=2).run(work)
    assert outcome.gives == {}
    assert not list(work.out.iterdir())
    json.dumps([outcome.summary, outcome.figures], allow_nan=False)
    # the numbers are those of the library on the same texts
    tokenizer = bases.load_tokenizer(work.model)
    model = bases.load_causal_lm(work.model)
    for name, file in (("task", work.examples), ("guard", work.guard)):
        items = [encode(row, tokenizer) for row in rows.load(file)[:5]]
        texts = [[*item.prompt, *item.answer][:40] for item in items]
        found = sinks.diagnose(model, [sinkcosts.padded([text]) for text in texts])
        assert outcome.summary[f"{name}_attention_on_first_token"] == pytest.approx(found.share, abs=1e-4)
        assert outcome.summary[f"{name}_tokens"] == sum(map(len, texts)) == found.tokens
        assert outcome.summary[f"{name}_dormant_heads_at_rest_nats"] == 0  # a random model has no dormant heads
        cost = sinkcosts.eviction_cost(model, texts, draws=2, seed=0)
        assert outcome.summary[f"{name}_dropping_first_token_nats"] == pytest.approx(
            cost.without_first - cost.whole, abs=2e-4
        )
    kinds = [figure["kind"] for figure in outcome.figures]
    assert kinds == ["heatmap"] * 4 + ["lines", "table", "table", "bars", "lines"]
    assert len({figure["title"] for figure in outcome.figures}) == len(kinds)
    for figure in outcome.figures:
        if figure["kind"] != "table":
            assert draw(figure)["data"]
            assert describe(figure)
    first = outcome.figures[0]
    assert (
        (len(first["z"]), len(first["z"][0]))
        == (len(first["y"]), len(first["x"]))
        == (4, model.config.num_attention_heads)
    )
    meaning = next(f for f in outcome.figures if f["title"] == "What it means")
    assert all(len(row) == len(meaning["columns"]) for row in meaning["rows"])
    assert meaning["rows"][0] == [
        "task",
        "dormant heads",
        "0 of 16, +0.000 nats if they rest for good",
        "no head to spare",
    ]
    again = step(rows=5, max_tokens=40, draws=2).run(job(tmp_path, name="again"))
    assert (again.summary, again.figures) == (outcome.summary, outcome.figures)


def test_every_key_changes_something(tmp_path):
    plain = step(rows=4, max_tokens=40).run(job(tmp_path, name="plain"))
    for i, keys in enumerate(({"rows": 3}, {"max_tokens": 30}, {"dormant": 0.01}, {"draws": 1})):
        other = step(**{"rows": 4, "max_tokens": 40} | keys).run(job(tmp_path, name=str(i)))
        assert (other.summary, other.figures) != (plain.summary, plain.figures), keys


def test_heads_counted_as_dormant_are_put_to_rest(tmp_path):
    """With a threshold below every head's mass, all heads rest: the loss of attention replaced by V_0 everywhere."""
    work = job(tmp_path)
    outcome = step(rows=4, max_tokens=40, dormant=0.001).run(work)
    assert outcome.summary["task_dormant_heads"] == "16 of 16"
    tokenizer, model = bases.load_tokenizer(work.model), bases.load_causal_lm(work.model)
    items = [encode(row, tokenizer) for row in rows.load(work.examples)[:4]]
    texts = [[*item.prompt, *item.answer][:40] for item in items]
    plain = sinkcosts.mean_nats(model, texts)
    with move_to_first(model, range(4)):
        rested = sinkcosts.mean_nats(model, texts)
    assert outcome.summary["task_dormant_heads_at_rest_nats"] == pytest.approx(rested - plain, abs=2e-4)
    assert rested != plain


def test_without_a_guard_there_is_one_domain(tmp_path):
    outcome = step(rows=2).tiny().run(job(tmp_path, guard=False))
    assert not any(key.startswith("guard") for key in outcome.summary)
    assert len(outcome.figures) == 6


def test_rows_too_short_are_an_error(tmp_path):
    work = job(tmp_path)
    write_jsonl(work.examples, [{"id": "a", "prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="longer than 8"):
        step().run(work)
