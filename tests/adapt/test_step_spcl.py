"""The step: dialogues and texts, encoder and adapter, three losses; what is saved predicts as what was trained."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import write_jsonl
from residency import classifier, dialogues, encoders, plan, recipe, rows, run
from residency.adapt.step_spcl import SPCLStepParams, TuneSPCL, objective
from residency.errors import PlanError, RecipeError
from residency.progress import Progress
from residency.step import Job

FELT = {"joy": "wonderful lovely", "anger": "terrible awful", "neutral": "table window"}


def talk(i, text_only=False):
    """A row whose last turn holds the words of its class; the turn before holds another's."""
    label = list(FELT)[i % 3 if i % 5 else 0]  # joy is frequent
    other = list(FELT.values())[(i + 1) % 3]
    if text_only:
        return {"id": f"t{i}", "text": f"{FELT[label]} {i}", "label": label}
    turns = [{"speaker": "Ann", "text": f"{other} {i}"}, {"speaker": "Bob", "text": f"{FELT[label]} {i}"}]
    return {"id": f"d{i}", "dialogue": turns, "label": label}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A tiny BERT with [CLS], [SEP] and [MASK]."""
    from transformers import BertConfig, BertModel, BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*" ".join(FELT.values()).split(), "ann", "bob", "for", "utterance", "feels", ":", *"0123456789"]
    pieces = [f"##{d}" for d in range(10)]
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate([*special, *words, *pieces])})
    folder = tmp_path_factory.mktemp("masked")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def job(tmp_path, base, data, device="cpu"):
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir(parents=True)
    file = tmp_path / "rows.jsonl"
    rows.write(file, rows.read(data).rows)
    return Job(
        model=base,
        rows=file,
        examples=file,
        test=file,
        guard=None,
        out=tmp_path / "out",
        scratch=tmp_path / "scratch",
        seed=1,
        device=device,
        read=None,
        base=None,
        progress=Progress(),
        task={},
    )


def tune(tmp_path, base, data, **keys):
    keys = {"epochs": 2, "batch": 8, "precision": "float32", "learning_rate": 2e-3} | keys
    found = job(tmp_path, base, data)
    outcome = TuneSPCL(SPCLStepParams(**keys)).run(found)
    return outcome, tmp_path / "out" / "model", found


SMALL = {"queue": 8, "support": 2}


@pytest.mark.parametrize("form", ["encoder", "adapter"])
@pytest.mark.parametrize("loss", ["spcl", "supcon", "cross-entropy"])
def test_what_is_saved_predicts_what_was_trained(tmp_path, masked, loss, form):
    data = [talk(i) for i in range(48)]
    own = SMALL if loss == "spcl" else {}
    outcome, folder, _ = tune(tmp_path, masked, data, loss=loss, train=form, epochs=6, learning_rate=3e-3, **own)
    summary = outcome.summary
    assert summary["rows"] == 48
    assert summary["classes"] == 3
    assert summary["fewest_per_class"] == min(sum(talk(i)["label"] == c for i in range(48)) for c in FELT)
    assert summary["pooling"] == ("mask" if form == "encoder" else "mean")
    assert summary["training_accuracy"] > 0.6  # the most frequent class has 0.46
    items = [encoders.item_of(r) for r in rows.read(data).rows]
    said = list(classifier.load(folder).predict(items, batch=7))
    gold = [row["label"] for row in data]
    # the loaded classifier is right exactly as often as the step said of what it trained
    assert sum(a == b for a, b in zip(said, gold, strict=True)) / 48 == pytest.approx(
        summary["training_accuracy"], abs=1e-4
    )
    if loss != "cross-entropy":  # the nearest class mean, by hand
        z = torch.nn.functional.normalize(torch.from_numpy(encoders.load(folder).encode(items)), dim=-1)
        head = classifier.ClassHead.load(folder)
        nearest = [head.classes[k] for k in (z @ head.weight.T).argmax(1).tolist()]
        assert said == nearest
        tau = {"spcl": 2 * 0.08, "supcon": 0.1}[loss]
        torch.testing.assert_close(head.weight.norm(dim=1), torch.full((3,), 1 / tau))


def test_figures_are_those_of_the_run_directory(tmp_path, masked):
    outcome, _, _ = tune(tmp_path, masked, [talk(i) for i in range(30)], curriculum="difficulty", epochs=3, **SMALL)
    kinds = [(f["kind"], f["title"]) for f in outcome.figures]
    assert [k for k, _ in kinds] == ["lines", "bars", "scatter", "scatter", "lines", "lines"]
    first, last = outcome.figures[2:4]
    for figure in (first, last):
        assert len(figure["x"]) == len(figure["y"]) == len(figure["group"]) == len(figure["hover"]) == 30 + 3
        assert figure["group"].count("class means") == 3
    assert first["x"] != last["x"]
    for shares in outcome.figures[4]["series"]:
        assert sum(shares["y"]) == pytest.approx(1, abs=0.01)
    every, chosen = outcome.figures[5]["series"]
    assert every["x"] == [1, 2, 3]
    assert chosen["y"][0] < every["y"][0]
    assert outcome.summary["optimiser_steps"] == 3 * 2  # 15 of 30 rows in batches of 8
    json.dumps(outcome.figures, allow_nan=False)


def test_every_other_key_leads_elsewhere(tmp_path, masked):
    data = [talk(i) for i in range(36)]
    base = {"max_steps": 6, "train": "adapter", "learning_rate": 1e-2} | SMALL
    weights = {}
    for name, keys in {
        "plain": {},
        "again": {},
        "hidden": {"hidden": 16},
        "pooling": {"pooling": "first"},
        "loss": {"loss": "supcon", "queue": None, "support": None},
        "batch": {"batch": 5},
    }.items():
        given = {k: v for k, v in (base | keys).items() if v is not None}
        _, folder, _ = tune(tmp_path / name, masked, data, **given)
        weights[name] = classifier.ClassHead.load(folder).weight
    assert torch.equal(weights.pop("again"), weights["plain"])
    plain = weights.pop("plain")
    same = [name for name, w in weights.items() if w.shape == plain.shape and torch.equal(w, plain)]
    assert not same, f"these keys changed nothing: {same}"


def test_whoever_predicts_cuts_where_the_training_did(tmp_path, masked):
    data = [talk(i) for i in range(24)]
    _, folder, _ = tune(tmp_path, masked, data, max_tokens=32, max_steps=2, **SMALL)
    encoder = encoders.load(folder)
    assert len(encoder.ids("lovely " * 60)) == 32
    assert len(encoder.ids((("Ann", "awful " * 60), ("Bob", "lovely")))) == 32


@pytest.mark.parametrize("form", ["encoder", "adapter"])
def test_whoever_predicts_shows_as_many_turns_as_the_training_did(tmp_path, masked, form):
    data = [talk(i) for i in range(24)]
    _, folder, _ = tune(tmp_path, masked, data, train=form, turns=0, max_steps=2, **SMALL)
    encoder = encoders.load(folder)
    a, b = encoder.encode([(("Bob", "lovely 1"),), (("Ann", "awful 9"), ("Bob", "lovely 1"))])
    assert a.tolist() == pytest.approx(b.tolist(), abs=1e-5)


def test_plain_texts_and_mixed_rows(tmp_path, masked):
    data = [talk(i, text_only=True) for i in range(24)]
    outcome, folder, found = tune(tmp_path / "a", masked, data, epochs=4, **SMALL)
    assert outcome.summary["pooling"] == "mean"
    said = list(classifier.load(folder).predict([r["text"] for r in data]))
    right = sum(a == r["label"] for a, r in zip(said, data, strict=True)) / 24
    assert right == pytest.approx(outcome.summary["training_accuracy"], abs=1e-4)
    mixed = [talk(i, text_only=i % 2 == 0) for i in range(24)]
    assert tune(tmp_path / "b", masked, mixed, max_steps=2, **SMALL)[0].summary["pooling"] == "mean"
    asked = {"id": "q", "instruction": "What?", "output": "That."}
    outcome, _, found = tune(tmp_path / "c", masked, [*data, asked], max_steps=2, **SMALL)
    assert outcome.summary["refused"] == 1
    assert [r.reason for r in found.quarantine] == ["the row has no text or dialogue with one label"]
    with pytest.raises(PlanError, match="pooling: mask needs"):
        tune(tmp_path / "d", masked, data, pooling="mask", **SMALL)
    with pytest.raises(PlanError, match="two classes"):
        tune(tmp_path / "e", masked, [r for r in data if r["label"] == "joy"], **SMALL)


def test_the_losses_keys_reach_the_loss():
    keys = {"temperature": 0.3, "queue": 7, "support": 5, "curriculum": "half", "official": True}
    loss = objective(SPCLStepParams(**keys), 3, 4)
    assert [loss.temperature, loss.queue.vectors.shape[1], loss.support, loss.curriculum, loss.official] == [
        *keys.values()
    ]
    assert [objective(SPCLStepParams(loss=name), 3, 4).temperature for name in ("spcl", "supcon")] == [0.08, 0.1]
    assert objective(SPCLStepParams(loss="supcon", temperature=0.5), 3, 4).temperature == 0.5


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"loss": "supcon", "queue": 9}, "`queue` belong"),
        ({"loss": "cross-entropy", "temperature": 0.1}, "does not read it"),
        ({"hidden": 9}, "train: adapter"),
        ({"queue": 4}, "queue of 4"),
        ({"loss": "triplet"}, "spcl"),
        ({"batch": 1}, "2"),
    ],
)
def test_keys_that_would_not_be_read_are_refused(keys, says):
    with pytest.raises(ValueError, match=says):
        SPCLStepParams(**keys)


def test_learning_rates_where_none_is_given():
    assert SPCLStepParams().learning_rate == 5e-5
    assert SPCLStepParams(train="adapter").learning_rate == 1e-3
    assert SPCLStepParams.model_validate({"train": "adapter", "learning-rate": 0.5}).learning_rate == 0.5
    assert SPCLStepParams(turns=2).context == 2
    assert (SPCLStepParams().context, SPCLStepParams(train="adapter").context) == (dialogues.TURNS, 0)


RECIPE = """\
residency: 1
name: feelings
base: tiny-text-encoder
task: {examples: a.jsonl, test: b.jsonl, metric: macro-f1}
steps:
  - tune: {method: spcl, epochs: 2, batch: 8, learning-rate: 3e-3, queue: 8, support: 2, turns: 8}
  - evaluate: {speed: false, resamples: 200}
"""


@pytest.fixture
def spoken(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [talk(i) for i in range(30)])
    write_jsonl(tmp_path / "b.jsonl", [talk(i) for i in range(30, 60)])
    return tmp_path / "recipe.yaml"


def test_a_recipe_of_dialogues_runs_to_its_report(spoken):
    record = run.execute(recipe.parse(RECIPE, spoken), spoken.parent / "run")
    base, tuned = record["exams"]
    assert base["task"] is None
    assert tuned["task"]["n"] == 30
    assert 0 <= tuned["task"]["value"] <= 1
    assert record["steps"][0]["summary"]["pooling"] == "mean"  # this tokenizer has no mask token
    report = (spoken.parent / "run" / "report.html").read_text()
    assert "Rows and class means after training" in report
    again = run.execute(recipe.parse(RECIPE, spoken), spoken.parent / "run")
    assert again["exams"][1]["task"] == tuned["task"]


@pytest.mark.parametrize(
    ("old", "new", "error", "says"),
    [
        ("metric: macro-f1", "metric: rouge-l", PlanError, "rouge-l"),
        ("tiny-text-encoder", "tiny-llama", PlanError, "needs a text-encoder"),
        ("turns: 8", "max-tokens: 1000", PlanError, "positions"),
        ("turns: 8", "loss: supcon", RecipeError, "belong to loss: spcl"),
        ("turns: 8", "tau: 1", RecipeError, "tau"),
    ],
)
def test_what_cannot_work_is_refused_by_the_plan(spoken, old, new, error, says):
    with pytest.raises(error, match=says):
        plan.make(recipe.parse(RECIPE.replace(old, new), spoken))


def test_the_plan_knows_what_it_costs(spoken):
    kinds = ("turns: 8", "curriculum: half", "train: adapter")
    made = [plan.make(recipe.parse(RECIPE.replace("turns: 8", kind), spoken)) for kind in kinds]
    costs = [next(n for n in p.nodes if isinstance(n.step, TuneSPCL)).forecast.flops for p in made]
    assert costs[0] > costs[1] > costs[2] > 0
    assert made[0].final.model.kind == "classifier"
