"""Both steps on generated images and texts: what is saved predicts as what was trained, and says what became of rows."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch

from helpers import write_jsonl
from residency import classifier, encoders, rows
from residency.adapt.noisyparams import CAProParams, FoProParams
from residency.adapt.step_noisy import TuneCAPro, TuneFoPro
from residency.embedded import base_folder
from residency.errors import DataError, PlanError
from residency.progress import Progress
from residency.report.figures import draw
from residency.step import Job, State

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}
NAMES = list(COLOURS)


def picture(name, seed):
    from PIL import Image

    g = np.random.default_rng(seed)
    pixels = np.clip(np.array(COLOURS[name]) + g.normal(0, 40, (12, 12, 3)), 0, 255).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_rows(n, noisy, start=0):
    """Every fourth noisy row carries the next colour's name; captions follow the picture in four fifths of them."""
    found = []
    for i in range(start, start + n):
        true = NAMES[i % 3]
        label = NAMES[(i + 1) % 3] if noisy and i % 4 == 3 else true
        row = {"id": f"i{i}", "image": picture(true, i), "label": label, "tag": f"shows {true}"}
        found.append(row | ({"text": f"a {true} square"} if noisy and i % 5 else {}))
    return found


def text_rows(n, noisy, start=0):
    words = {"red": "rose tomato", "green": "grass frog", "blue": "sky ocean"}
    return [
        {
            "id": f"t{i}",
            "text": f"{words[NAMES[i % 3]]} {words[NAMES[i % 3]]} {i}",
            "label": NAMES[(i + 1) % 3] if noisy and i % 4 == 3 else NAMES[i % 3],
        }
        for i in range(start, start + n)
    ]


def job(tmp_path, base, examples, **sources):
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir(parents=True)
    file = tmp_path / "rows.jsonl"
    rows.write(file, rows.read(write_jsonl(tmp_path / "examples.jsonl", examples)).rows)

    def read(name, quarantine):
        yield from rows.read(write_jsonl(tmp_path / f"{name}.jsonl", sources[name])).rows

    return Job(
        model=base_folder(base),
        rows=file,
        examples=file,
        test=file,
        guard=None,
        out=tmp_path / "out",
        scratch=tmp_path / "scratch",
        seed=1,
        device="cpu",
        read=read,
        base=lambda ref: base_folder(ref),
        progress=Progress(),
        task={},
    )


KEYS = {
    "noisy": "x",
    "epochs": 6,
    "learning_rate": 5e-3,
    "batch": 8,
    "precision": "float32",
    "middle": 32,
    "project": 16,
    "queue": 64,
}
EARLY = {"prototypes_from": 0.2, "clean_from": 0.5}


def fopro(**keys):
    return TuneFoPro(FoProParams(**(KEYS | EARLY | {"relation_from": 0.7} | keys)))


def capro(**keys):
    return TuneCAPro(CAProParams(**(KEYS | EARLY | {"text_encoder": "tiny-text-encoder", "select": 4} | keys)))


def ledger_of(found):
    return [json.loads(line) for line in (found.out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]


def checked(found, outcome, n):
    """The folder, the ledger, the cleaned rows and the figures say the same."""
    fates = ledger_of(found)
    assert len(fates) == n
    for what in ("kept", "relabelled", "dropped"):
        assert outcome.summary[what] == sum(f["what"] == what for f in fates)
    cleaned = rows.load(found.out / "cleaned.jsonl")
    assert [r.label for r in cleaned] == [f["now"] for f in fates if f["now"]]
    titles = [figure["title"] for figure in outcome.figures]
    assert len(titles) == 7
    for figure in outcome.figures:
        if figure["kind"] not in ("table", "gallery"):
            draw(figure)
    json.dumps(outcome.figures)
    changes = next(f for f in outcome.figures if f["kind"] == "heatmap")
    assert sum(map(sum, changes["z"])) == sum(f["what"] != "trusted" for f in fates)
    return fates


@pytest.mark.parametrize("make", [fopro, capro])
def test_images_on_an_adapter(tmp_path, make):
    torch.manual_seed(5)
    found = job(tmp_path, "tiny-image-encoder", image_rows(6, False), noisy=image_rows(60, True, 6))
    outcome = make().run(found)
    fates = checked(found, outcome, 66)
    assert outcome.summary["trusted_rows"] == 6
    assert {f["what"] for f in fates[:6]} == {"trusted"}
    true = [NAMES[i % 3] for i in range(66)]
    wrong = [f["given"] != t for f, t in zip(fates, true, strict=True)]
    mended = [f["now"] == t for f, t, w in zip(fates, true, wrong, strict=True) if w]
    assert sum(mended) > 0.6 * len(mended)  # colours are easy: most wrong labels are put right
    spoilt = [f["now"] not in (t, "") for f, t, w in zip(fates, true, wrong, strict=True) if not w]
    assert sum(spoilt) < 0.1 * len(spoilt)
    # what was saved is what was trained: the classifier says on every row what the ledger says it did
    pictures = [r.image for r in rows.load(found.out / "cleaned.jsonl")]
    predictor = classifier.load(found.out / "model")
    features = torch.from_numpy(encoders.load(found.out / "model").encode(pictures))
    p = predictor.head(features).exp()
    kept = [f for f in fates if f["now"]]
    for row, fate in zip(p.tolist(), kept, strict=True):
        assert row[predictor.head.classes.index(fate["given"])] == pytest.approx(fate["classifier"], abs=2e-4)
    unseen = image_rows(30, False, 200)
    said = list(predictor.predict([r["image"] for r in unseen]))
    assert sum(a == r["label"] for a, r in zip(said, unseen, strict=True)) > 27
    gallery = next(f for f in outcome.figures if f["kind"] == "gallery")
    assert 0 < len(gallery["items"]) <= 24
    assert all(item["image"].startswith("data:image/png") and "shows" in item["text"] for item in gallery["items"])
    if make is capro:
        assert 0 < outcome.summary["chosen_by_caption"] <= 12
        assert all(f["what"] == "trusted" for f in fates[:6])
    assert not any(found.scratch.glob("encoder*"))


@pytest.mark.parametrize("make", [fopro, capro])
def test_texts_on_an_adapter_and_doubles_in_quarantine(tmp_path, make):
    noisy = text_rows(45, True, 6)
    noisy.append(noisy[0] | {"id": "again"})  # the reader itself takes this one out
    noisy.append(text_rows(1, False)[0] | {"id": "t900"})  # a trusted row
    noisy.append({"id": "several", "text": "grass and sky", "labels": ["green", "blue"]})
    noisy.append({"id": "picture", "image": picture("red", 1), "label": "red", "text": "a rose"})
    found = job(tmp_path, "tiny-text-encoder", text_rows(6, False), noisy=noisy)
    keys = {"text_encoder": None} if make is capro else {}
    outcome = make(**keys).run(found)
    checked(found, outcome, 51)
    reasons = sorted(r.reason for r in found.quarantine)
    assert reasons == ["the row has no text with one label"] * 2 + ["the same row as the trusted row t0"]
    said = list(classifier.load(found.out / "model").predict([r["text"] for r in text_rows(9, False)]))
    assert set(said) <= set(NAMES)
    table = outcome.figures[0]
    assert table["kind"] == "table" or not table["items"]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_whole_encoder(tmp_path, kind):
    make = image_rows if kind == "image" else text_rows
    found = job(tmp_path, f"tiny-{kind}-encoder", make(6, False), noisy=make(30, True, 6))
    outcome = (
        fopro(train="encoder", epochs=2, max_tokens=32).run(found)
        if kind == "text"
        else fopro(train="encoder", epochs=2).run(found)
    )
    checked(found, outcome, 36)
    before, after = (encoders.load(f) for f in (base_folder(f"tiny-{kind}-encoder"), found.out / "model"))
    item = make(1, False)[0][kind]
    assert not np.allclose(before.encode([item]), after.encode([item]), atol=1e-4)
    predictor = classifier.load(found.out / "model")
    features = torch.from_numpy(predictor.encoder.encode([make(6, False)[i][kind] for i in range(6)]))
    p = predictor.head(features).exp()
    for row, fate in zip(p.tolist(), ledger_of(found)[:6], strict=True):
        assert row[predictor.head.classes.index(fate["given"])] == pytest.approx(fate["classifier"], abs=2e-3)


def test_captions_choose_among_noisy_rows(tmp_path):
    """With captions that tell the truth, the rows chosen are right where their labels are; texts by mapping and file."""
    picked = []
    for i, texts in enumerate(({c: f"a {c} square" for c in NAMES}, "texts")):
        sources = {"noisy": image_rows(60, True, 6)}
        if texts == "texts":
            sources["texts"] = [{"text": f"a {c} square", "label": c} for c in NAMES]
        found = job(tmp_path / str(i), "tiny-image-encoder", image_rows(3, False), **sources)
        step = capro(texts=texts, max_steps=2, smooth=0)
        assert set(step.sources()) == set(sources)
        step.run(found)
        fates = ledger_of(found)[3:]
        chosen = [j for j, f in enumerate(fates) if f["what"] == "trusted"]
        assert len(chosen) == 12
        assert all(fates[j]["given"] == NAMES[j % 3] for j in chosen)  # 6 + j has the colour of j
        picked.append(chosen)
    assert picked[0] == picked[1]


def test_what_cannot_work_is_refused(tmp_path):
    found = job(tmp_path / "a", "tiny-image-encoder", image_rows(3, False), noisy=text_rows(5, True))
    with pytest.raises(DataError, match="no noisy rows"):
        fopro().run(found)
    bare = [{k: v for k, v in r.items() if k != "text"} for r in image_rows(9, True, 6)]
    found = job(tmp_path / "b", "tiny-image-encoder", image_rows(3, False), noisy=bare)
    with pytest.raises(DataError, match="no row has a caption"):
        capro(views=0).run(found)
    found = job(tmp_path / "c", "tiny-image-encoder", image_rows(3, False), noisy=image_rows(9, True, 6))
    with pytest.raises(DataError, match="no class"):
        capro(views=0, texts={"purple": "a colour"}).run(found)
    red = [r for r in image_rows(9, False, 6) if r["label"] == "red"]
    found = job(tmp_path / "d", "tiny-image-encoder", red[:1], noisy=red[1:])
    with pytest.raises(DataError, match="two classes"):
        fopro(views=0).run(found)
    for keys, said in (
        ({"train": "encoder", "views": 2}, "does not read `views`"),
        ({"max_tokens": 64}, "does not read `max-tokens`"),
        ({"clean_from": 0.1}, "in order"),
        ({"smooth": 30}, "of 20"),
        ({"noisy": ""}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            (capro if "smooth" in keys else fopro)(**keys)


def test_plan_and_rehearsal(tmp_path):
    from residency import bases

    facts = {k: bases.facts(base_folder(f"tiny-{k}-encoder")) for k in ("image", "text")}
    state = State(
        model=facts["image"],
        rows=6,
        source_rows={"noisy": 60, "texts": 3},
        metrics=("macro-f1",),
        others={"text_encoder": facts["text"]},
    )
    forecast = capro().plan(state)
    assert forecast.after.model.kind == "classifier"
    assert forecast.flops > fopro().plan(state).flops > 0
    assert "60 noisy" in forecast.notes[0]
    for bad, said in (
        (State(model=facts["image"], rows=6, metrics=("pearson",)), "pearson"),
        (State(model=forecast.after.model, rows=6, metrics=("macro-f1",)), "classifier"),
    ):
        with pytest.raises(PlanError, match=said):
            fopro().plan(bad)
    with pytest.raises(PlanError, match="captions need a text-encoder"):
        capro(text_encoder=None).plan(state)
    for make in (fopro, capro):
        found = job(tmp_path / make.__name__, "tiny-image-encoder", image_rows(3, False), noisy=image_rows(12, True, 6))
        tiny = make(train="encoder").tiny()
        assert tiny.run(found).summary["optimiser_steps"] == 4
