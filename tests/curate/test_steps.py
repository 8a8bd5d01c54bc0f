"""The `curate` step: any score, any selector, filters, budgets, and a kill in the middle of measuring."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers import qa, write_jsonl
from residency import catalog, recipe, rows, run, store
from residency.curate import measuring
from residency.curate.expressions import percentile
from residency.curate.steps import curate_by
from residency.errors import DataError, PlanError, RecipeError

HEAD = """\
residency: 1
name: curating
base: tiny-llama
task: {examples: data/examples.jsonl, test: data/test.jsonl, metric: choice-accuracy}
steps:
"""


@pytest.fixture
def curated(tmp_path):
    """Runs steps over a pool of 40 rows with two tags; returns the record, a folder finder and the steps' tables."""
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "examples.jsonl", [qa(i) for i in range(8)])
    write_jsonl(data / "test.jsonl", [qa(i) for i in range(100, 104)])
    pool = [qa(i) | {"category": "permit"} for i in range(20, 40)]
    pool += [qa(i, "music") | {"category": "music", "output": "la la la " + "la " * i} for i in range(20, 40)]
    write_jsonl(data / "pool.jsonl", pool)

    def go(*steps):
        file = tmp_path / "recipe.yaml"
        file.write_text(HEAD + "".join(f"  - {step}\n" for step in steps))
        record = run.execute(recipe.load(file), tmp_path / "run")
        folders = [store.RunStore(tmp_path / "run").folder(s["id"], s["address"]) for s in record["steps"]]
        return record["steps"], folders

    go.file = tmp_path / "recipe.yaml"
    go.root = tmp_path
    return go


ENCODER = "encoder: tiny-text-encoder"


def test_scores_filter_and_choice_are_in_the_table_and_agree(curated):
    steps, (folder,) = curated(
        "curate: {by: k-shot, pool: data/pool.jsonl, keep: 6, near-duplicates: 1, " + ENCODER + ", "
        "scores: [type-token, {distinct: {n: 2, as: pairs}}, similarity], filter: 'pairs > 0.5 and tag == \"permit\"'}"
    )
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    passes = [p > 0.5 and t == "permit" for p, t in zip(table["pairs"], table["tag"], strict=True)]
    assert 0 < sum(passes) < 40
    for ok, reason, place in zip(passes, table["reason"], table["chosen"], strict=True):
        assert ok != reason.startswith("dropped: filter")
        assert (place is not None) == reason.startswith("kept")
    best = sorted((i for i in range(40) if passes[i]), key=lambda i: -table["similarity"][i])[:6]
    order = sorted((p, i) for i, p in enumerate(table["chosen"]) if p)
    assert [p for p, _ in order] == [1, 2, 3, 4, 5, 6]
    assert {i for _, i in order} == set(best)
    written = rows.load(folder / "rows.jsonl")
    assert [r.id for r in written[:8]] == [f"permit-{i}" for i in range(8)]
    assert [r.id for r in written[8:]] == [table["id"][i] for _, i in order]
    assert steps[0]["summary"]["kept"] == 6
    kinds = {(f["kind"], f["title"]) for f in steps[0]["figures"]}
    assert {("heatmap", "Which scores say the same"), ("heatmap", "Which choices overlap")} <= kinds
    assert ("bars", "pairs: the pool, and what was kept") in kinds
    json.dumps(steps[0], allow_nan=False)


def test_budgets(curated):
    steps, folders = curated(
        f"curate: {{by: k-shot, pool: data/pool.jsonl, keep: 25%, near-duplicates: 1, {ENCODER}}}",
        f"curate: {{by: k-shot, pool: data/pool.jsonl, keep: 600 tokens, near-duplicates: 1, {ENCODER}}}",
    )
    assert steps[0]["summary"]["kept"] == 10
    from transformers import AutoTokenizer

    from residency import bases

    tokenizer = AutoTokenizer.from_pretrained(bases.resolve("tiny-llama", curated.root).folder)
    kept = rows.load(folders[1] / "rows.jsonl")[-steps[1]["summary"]["kept"] :]
    spent = sum(len(tokenizer(r.content, add_special_tokens=False)["input_ids"]) for r in kept)
    table = pq.read_table(folders[1] / "scores.parquet").to_pydict()
    assert 0 < spent <= 600
    assert all(r.startswith(("kept", "dropped")) for r in table["reason"])
    # the next in line would not have fitted
    assert spent + min(len(tokenizer(r.content)["input_ids"]) for r in kept) > 600 - 200


def test_without_a_pool_the_rows_at_hand_are_chosen_from_and_trusted_rows_stay(curated):
    steps, folders = curated(
        f"curate: {{by: k-shot, pool: data/pool.jsonl, keep: 20, near-duplicates: 1, {ENCODER}}}",
        "curate: {by: filter, scores: [type-token], filter: percentile(type-token) > 50}",
    )
    assert steps[1]["summary"]["pool"] == 20
    values = pq.read_table(folders[1] / "scores.parquet")["type-token"].to_numpy()
    expected = int((percentile(values) > 50).sum())
    assert 0 < expected < 20
    assert steps[1]["summary"]["kept"] == expected
    assert len(rows.load(folders[1] / "rows.jsonl")) == 8 + expected
    assert not any("encoder" in str(k) for k in steps[1]["inputs"])
    assert steps[1]["summary"]["quarantined"] == 0


def test_a_killed_step_measures_only_what_is_missing(curated, monkeypatch):
    monkeypatch.setattr("residency.curate.pool.CHUNK", 8)
    step = f"curate: {{by: k-shot, pool: data/pool.jsonl, keep: 9, near-duplicates: 1, scores: [mtld], {ENCODER}}}"
    steps, folders = curated(step)
    expected = (folders[0] / "rows.jsonl").read_bytes(), pq.read_table(folders[0] / "scores.parquet")
    import shutil

    shutil.rmtree(curated.root / "run")
    called = []
    measure = measuring.Measurer.__call__

    def failing(self, part, *rest):
        called.append(len(part))
        if len(called) == 3:
            raise KeyboardInterrupt
        return measure(self, part, *rest)

    monkeypatch.setattr(measuring.Measurer, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        curated(step)
    called[:] = [0, 0, 0]
    _, folders = curated(step)
    assert called[3:] == [8, 8, 8]
    assert (folders[0] / "rows.jsonl").read_bytes() == expected[0]
    assert pq.read_table(folders[0] / "scores.parquet") == expected[1]


@pytest.mark.parametrize(
    ("keys", "error", "says"),
    [
        ("by: filter", PlanError, "nothing to filter by"),
        ("by: filter, scores: [mltd], filter: mtld > 1", RecipeError, "did you mean `mtld`"),
        ("by: filter, scores: [mtld], filter: mltd > 1", RecipeError, "did you mean `mtld`"),
        ("by: filter, scores: [mtld], filter: mtld", RecipeError, "not a condition"),
        ("by: filter, scores: [mtld], filter: tag > 3", RecipeError, "compares texts"),
        ("by: top, scores: [mtld], quality: mtld > 3", RecipeError, "no number"),
        ("by: filter, scores: [mtld, mtld], filter: mtld > 1", RecipeError, "two columns"),
        ("by: filter, scores: [{mtld: {treshold: 1}}], filter: mtld > 1", RecipeError, "no such key"),
        ("by: filter, scores: [{mtld: {threshold: 2}}], filter: mtld > 1", RecipeError, "less than 1"),
        ("by: filter, scores: [{mtld: 3}], filter: mtld > 1", RecipeError, "a score is a name"),
        ("by: k-shot, keep: 0%", RecipeError, "share"),
        ("by: k-shot, keep: many", RecipeError, "budget"),
        ("by: k-shot, workers: 2", RecipeError, "workers belongs to"),
        ("by: nearest", RecipeError, "unknown `by`"),
        ("by: filter, scores: [mtld], filter: 'mtld > 1', keep: 3", RecipeError, "unknown key `keep`"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(curated, keys, error, says):
    with pytest.raises(error, match=says):
        curated(f"curate: {{pool: data/pool.jsonl, {keys}}}")


def test_a_filter_that_nothing_meets(curated):
    with pytest.raises(DataError, match="no row meets"):
        curated("curate: {pool: data/pool.jsonl, by: filter, scores: [mtld], filter: mtld > 1e9}")


def test_every_key_of_the_step_changes_its_address(curated):
    """No key is accepted and then ignored: what differs in the recipe differs in the content address."""
    keys = {
        "keep": ("6", "7"),
        "near-duplicates": ("1", "0.5"),
        "scores": ("[]", "[mtld]"),
        "filter": ('tag == "permit"', 'tag == "music"'),
        "batch": ("64", "8"),
    }
    for key, values in keys.items():
        found = set()
        for value in values:
            curated.file.write_text(
                HEAD + f"  - curate: {{by: k-shot, pool: data/pool.jsonl, {ENCODER}, {key}: '{value}'}}\n"
                if key == "filter"
                else HEAD + f"  - curate: {{by: k-shot, pool: data/pool.jsonl, {ENCODER}, {key}: {value}}}\n"
            )
            from residency import plan

            found.add(plan.make(recipe.load(curated.file)).nodes[2].address)
        assert len(found) == 2, key


def test_texts_and_embeddings_are_made_once(monkeypatch):
    made = []
    supply = measuring.Supply({"a": lambda: made.append(1) or np.arange(4)})
    part = supply.only(np.array([3, 1]), 4)
    assert part["a"].tolist() == [3, 1] == part.of(["a"])[0].tolist()
    assert supply.of(["a", "b?"])[1] is None
    assert made == [1]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A tiny classifier with one logit and a tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from residency import bases

    folder = tmp_path_factory.mktemp("reward")
    tokenizer = AutoTokenizer.from_pretrained(bases.resolve("tiny-llama", folder).folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_scores_by_models_share_one_pass_and_equal_the_library(curated, reward_model, monkeypatch):
    from residency import bases
    from residency.curate import reading
    from residency.curate.confidence import TokenEntropy
    from residency.curate.fluency import IFD

    passes = []
    original = reading.Answer.run
    monkeypatch.setattr(reading.Answer, "run", lambda self, *a: passes.append(1) or original(self, *a))
    names = "[ifd, perplexity, el2n, token-entropy, margin, least-confidence, {judge: {as: quality}}, "
    names += "{judge: {aspect: complexity, as: complexity}}, deita-score, reward, own-reward, necessity, grand, less]"
    steps, (folder,) = curated(
        f"curate: {{by: top, pool: data/pool.jsonl, keep: 7, scores: {names}, quality: -ifd, reward: {reward_model}}}"
    )
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    assert len(passes) == 1
    for column in ("ifd", "perplexity", "el2n", "quality", "complexity", "reward", "own-reward", "grand", "less"):
        assert np.isfinite(table[column]).all(), column
        assert np.std(table[column]) > 0, column
    folder_of = bases.resolve("tiny-llama", curated.root).folder
    model, tokenizer = bases.load_causal_lm(folder_of, "cpu"), bases.load_tokenizer(folder_of)
    pool = rows.read(curated.root / "data" / "pool.jsonl").rows
    found = reading.read(model, tokenizer, pool, [IFD(), TokenEntropy()])
    np.testing.assert_allclose(table["ifd"], IFD().score(found), rtol=1e-4)
    np.testing.assert_allclose(table["token-entropy"], TokenEntropy().score(found), rtol=1e-4)
    np.testing.assert_allclose(table["deita-score"], np.multiply(table["complexity"], table["quality"]))
    best = np.argsort(table["ifd"], kind="stable")[:7]
    assert {i for i, place in enumerate(table["chosen"]) if place} == set(best.tolist())
    assert {"model"} <= set(steps[0]["inputs"])


BY = [row.variant for row in catalog.step_rows("curate") if row.variant != "filter"]


@pytest.mark.parametrize("by", BY)
def test_every_selector_chooses_in_a_recipe(curated, by):
    budget = "keep: 9, " if "keep" in curate_by(by).Params.model_fields else ""
    more = {"quotas": "", "k-shot": "near-duplicates: 1, ", "deita": "near-duplicates: 1, "}.get(by, "")
    if by == "deita" and "near_duplicates" not in curate_by(by).Params.model_fields:
        more = ""
    asks = {n.removesuffix("?") for n in curate_by(by).selector.needs} & {"embeddings"}
    steps, (folder,) = curated(
        f"curate: {{by: {by}, pool: data/pool.jsonl, {budget}{more}scores: [{{distinct: {{n: 2}}}}]"
        f"{', ' + ENCODER if asks else ''}}}"
    )
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    kept = [place for place in table["chosen"] if place]
    assert sorted(kept) == list(range(1, len(kept) + 1))
    assert 1 <= len(kept) <= (9 if budget else 40)
    assert steps[0]["method"] == by
    for place, reason in zip(table["chosen"], table["reason"], strict=True):
        assert reason.startswith("kept" if place else "dropped")


def test_models_that_do_not_fit_are_refused_in_the_plan(curated):
    for keys, says in (
        ("by: top, scores: [reward]", "needs a reward model"),
        ("by: top, scores: [ifd], reader: tiny-text-encoder", "`reader` needs a causal-lm"),
        ("by: k-centre, encoder: tiny-llama", "`encoder` needs a text-encoder"),
        ("by: top", "none is named"),
        ("by: top, scores: [ifd, mtld]", "does not say which"),
        ("by: top, scores: [perplexity]", "does not say which"),
        ("by: k-centre, quality: line", "would be idle"),
        ("by: top, scores: [mtld], encoder: tiny-text-encoder", "`encoder` is given"),
        ("by: top, scores: [mtld], reader: tiny-llama", "`reader` is given"),
        ("by: top, scores: [mtld], batch: 8", "`batch` is given"),
    ):
        with pytest.raises(PlanError, match=says):
            curated(f"curate: {{pool: data/pool.jsonl, {keys}}}")


def test_a_missing_preference_comes_last_and_drops_nothing(curated):
    lines = [qa(i) for i in range(20, 25)] * 1 + [qa(i) | {"output": "x"} for i in range(25, 28)]
    write_jsonl(curated.root / "data" / "pool.jsonl", lines)
    steps, (folder,) = curated("curate: {pool: data/pool.jsonl, by: minhash, scores: [hdd]}")
    assert steps[0]["summary"]["missing_hdd"] == 8
    assert steps[0]["summary"]["kept"] == 8


def test_a_score_that_cannot_be_computed_says_which(curated):
    with pytest.raises(DataError, match=r"the score `forgetting` cannot be computed: no column"):
        curated("curate: {pool: data/pool.jsonl, by: top, scores: [forgetting]}")


def test_an_infinite_quality_is_the_best_there_is(curated):
    lines = [
        qa(i) | {"output": "la " * 60 if i < 30 else " ".join(f"w{'x' * k}" for k in range(60))} for i in range(20, 40)
    ]
    write_jsonl(curated.root / "data" / "pool.jsonl", lines)
    _, (folder,) = curated("curate: {pool: data/pool.jsonl, by: top, keep: 10, scores: [vocd]}")
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    assert np.isinf(table["vocd"]).any()
    assert {i for i, place in enumerate(table["chosen"]) if place} == set(range(10, 20))


def test_rows_without_a_label_are_labelled_by_their_tag(curated):
    lines = [qa(i, t) | {"category": t} for t in ("permit", "music") for i in range(8)]
    write_jsonl(curated.root / "data" / "examples.jsonl", lines)
    _, (folder,) = curated(f"curate: {{pool: data/pool.jsonl, by: top, keep: 5, scores: [knn-shapley], {ENCODER}}}")
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    assert np.isfinite(table["knn-shapley"]).all()
    assert np.std(table["knn-shapley"]) > 0


def test_a_seed_of_0_is_no_seed_and_others_draw_otherwise(curated):
    def kept(*seeds):
        steps, folders = curated(
            *(
                f"curate: {{by: random, pool: data/pool.jsonl, keep: 6{f', seed: {s}' if s is not None else ''}}}"
                for s in seeds
            )
        )
        tables = [pq.read_table(folder / "scores.parquet").to_pydict() for folder in folders]
        return [[i for i, place in enumerate(t["chosen"]) if place] for t in tables]

    unset, one = kept(None, 1)
    assert unset != one
    assert kept(0)[0] == unset


def test_a_reason_names_lines_of_the_source(curated):
    lines = [qa(20 + i) for i in range(12)] + [qa(25) | {"id": "copy", "instruction": qa(25)["instruction"] + " "}]
    write_jsonl(curated.root / "data" / "pool.jsonl", lines)
    _, (folder,) = curated("curate: {by: minhash, pool: data/pool.jsonl, filter: line > 4, threshold: 0.7}")
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    dropped = [(line, r) for line, r in zip(table["line"], table["reason"], strict=True) if "near-duplicate (" in r]
    assert dropped == [(13, "dropped: near-duplicate (Jaccard 1.00) of line 6")]


def test_labels_are_not_part_of_what_scores_of_labels_see(curated):
    rng = np.random.default_rng(0)
    words = [f"w{'x' * i}" for i in range(40)]
    noise = [
        {"text": " ".join(rng.choice(words, 12)), "label": str(rng.choice(["angry", "joyful"]))} for _ in range(120)
    ]
    write_jsonl(curated.root / "data" / "pool.jsonl", noise)
    _, (folder,) = curated(f"curate: {{by: top, pool: data/pool.jsonl, keep: 5, scores: [aflite], {ENCODER}}}")
    assert np.nanmean(pq.read_table(folder / "scores.parquet")["aflite"].to_numpy()) < 0.7


def test_a_budget_no_row_fits_in_and_a_pool_of_pictures_are_refused(curated):
    with pytest.raises(DataError, match="holds no row: the shortest has"):
        curated(f"curate: {{by: k-shot, pool: data/pool.jsonl, keep: 3 tokens, near-duplicates: 1, {ENCODER}}}")
    picture = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    write_jsonl(curated.root / "data" / "pool.jsonl", [{"image": picture, "label": "a"}])
    with pytest.raises(DataError, match="a picture without a text"):
        curated("curate: {by: random, pool: data/pool.jsonl, keep: 3}")


def test_test_questions_stay_out_whatever_the_system_says(curated):
    asked = qa(100)
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": asked["instruction"]},
        {"role": "assistant", "content": asked["output"]},
    ]
    write_jsonl(curated.root / "data" / "pool.jsonl", [qa(20), {"id": "leak", "messages": turns}])
    steps, (folder,) = curated("curate: {by: random, pool: data/pool.jsonl, keep: 5}")
    assert steps[0]["summary"]["quarantined"] == 1
    assert not any(r.id == "leak" for r in rows.load(folder / "rows.jsonl"))


@pytest.mark.parametrize("name", ["id", "and", "percentile", "a b", "#embeddings", "tag"])
def test_names_that_a_column_cannot_have(curated, name):
    with pytest.raises(RecipeError, match="no name for a column|two columns"):
        curated(f"curate: {{by: top, pool: data/pool.jsonl, scores: [{{mtld: {{as: '{name}'}}}}]}}")


def test_what_was_chosen_before_goes_along_and_does_not_count_as_trusted(curated):
    write_jsonl(curated.root / "data" / "more.jsonl", [qa(i, "river") for i in range(12)])
    steps, folders = curated(
        "curate: {by: random, pool: data/pool.jsonl, keep: 5}",
        f"curate: {{by: k-shot, pool: data/more.jsonl, keep: 4, near-duplicates: 1, {ENCODER}}}",
    )
    assert [s["summary"]["trusted"] for s in steps] == [8, 8]
    assert [s["summary"]["went_along"] for s in steps] == [8, 13]
    assert len(rows.load(folders[1] / "rows.jsonl")) == 17


def test_after_a_replay_only_the_trusted_rows_that_are_at_hand_stay(curated):
    write_jsonl(curated.root / "data" / "next.jsonl", [qa(i, "river") for i in range(12)])
    steps, folders = curated(
        "replay: {next: data/next.jsonl, per-task: 3, encoder: tiny-text-encoder}",
        "curate: {by: random, keep: 6}",
    )
    kept = rows.load(folders[1] / "rows.jsonl")
    assert steps[1]["summary"]["went_along"] == 3
    assert [r.id.split("-")[0] for r in kept] == ["permit"] * 3 + ["river"] * 6


def test_the_recipes_seed_reaches_scores(curated):
    found = []
    for seed in (1, 2):
        curated.file.write_text("")
        head = HEAD.replace("name: curating", f"name: curating\nseed: {seed}")
        curated.file.write_text(
            head + f"  - curate: {{by: top, pool: data/pool.jsonl, keep: 5, scores: [datamodels], {ENCODER}}}\n"
        )
        lines = [qa(i, t) | {"category": t} for t in ("permit", "music") for i in range(8)]
        write_jsonl(curated.root / "data" / "examples.jsonl", lines)
        record = run.execute(recipe.load(curated.file), curated.root / "run")
        folder = store.RunStore(curated.root / "run").folder("01-curate", record["steps"][0]["address"])
        found.append(pq.read_table(folder / "scores.parquet")["datamodels"].to_pylist())
    assert found[0] != found[1]
