"""Rows to classify: dialogues, captions, several labels, folders of images, `datasets` columns."""

from __future__ import annotations

import json

import numpy as np
import pytest

from helpers import write_jsonl
from residency import rows

PIL = pytest.importorskip("PIL.Image")
DIALOGUE = [{"speaker": "Ross", "text": "We were on a break!"}, {"speaker": "Rachel", "text": "Oh, really?"}]


def picture(value: int = 0, size=(6, 4)):
    return PIL.new("RGB", size, (value, 10, 200))


def test_a_dialogue_is_labelled_by_its_last_turn_and_comes_back_as_written(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": "d", "dialogue": DIALOGUE, "label": "anger"}])
    row = rows.read(file).rows[0]
    assert row.dialogue == (("Ross", "We were on a break!"), ("Rachel", "Oh, really?"))
    assert (row.prompt, row.answer) == ("Rachel: Oh, really?", "anger")
    again = rows.read([row.to_json()]).rows[0]
    assert again == row


def test_several_labels_are_sorted_into_one_answer(tmp_path):
    found = rows.read([{"text": "soup and waiter", "labels": ["service", "food"]}, {"text": "hm", "labels": []}])
    assert [r.answer for r in found.rows] == ["food | service", ""]
    assert rows.read([r.to_json() for r in found.rows]).rows[0].labels == ("service", "food")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"text": "a", "labels": "food"}, "not a list of texts"),
        ({"text": "a", "labels": ["food", "food"]}, "stands twice"),
        ({"text": "a", "labels": ["food | drink"]}, "separates labels"),
        ({"text": "a", "labels": ["food"], "label": "food"}, "both `label` and `labels`"),
        ({"dialogue": [], "label": "x"}, "not a list of turns"),
        ({"dialogue": [{"text": "hi"}], "label": "x"}, "turn 1 of `dialogue` has no speaker"),
        ({"dialogue": [{"speaker": "A", "text": " "}], "label": "x"}, "`text` is empty"),
        ({"dialogue": DIALOGUE}, "`label` is missing"),
        ({"image": 7, "label": "x"}, "`image` is int"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(raw, reason):
    good = {"text": "fine", "label": "x"}
    refused = rows.read([raw, good]).refused
    assert len(refused) == 1
    assert reason in refused[0].reason


def test_a_folder_of_folders_of_images_with_captions(tmp_path):
    from residency import encoders

    for i, (label, name) in enumerate([("cat", "a.png"), ("dog", "b.jpg"), ("cat", "c.PNG")]):
        (tmp_path / "pets" / label).mkdir(parents=True, exist_ok=True)
        picture(40 * i).save(tmp_path / "pets" / label / name)
    (tmp_path / "pets" / "cat" / "a.txt").write_text("a sleeping cat")
    found = rows.read(tmp_path / "pets").rows
    assert [(r.id, r.label, r.text) for r in found] == [
        ("cat/a.png", "cat", "a sleeping cat"),
        ("cat/c.PNG", "cat", None),
        ("dog/b.jpg", "dog", None),
    ]
    assert encoders.item_of(found[0]).endswith("pets/cat/a.png")


def test_images_outside_the_folder_are_refused(tmp_path):
    picture().save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    file = write_jsonl(
        tmp_path / "data" / "a.jsonl", [{"image": "../secret.png", "label": "x"}, {"text": "t", "label": "y"}]
    )
    assert "leaves the folder" in rows.read(file).refused[0].reason


def test_datasets_image_columns_and_class_labels(tmp_path):
    import datasets

    from residency.images import open_image

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "caption": datasets.Value("string"),
        }
    )
    made = datasets.Dataset.from_dict(
        {"image": [picture(5), picture(90)], "label": [1, 0], "caption": ["a dog", ""]}, features=features
    )
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "a.parquet")
    for source in (made, tmp_path / "saved"):
        found = rows.read(source).rows
        assert [(r.label, r.text) for r in found] == [("dog", "a dog"), ("cat", None)]
        assert np.asarray(open_image(found[1].image))[0, 0].tolist() == [90, 10, 200]
    parquet = rows.read(tmp_path / "a.parquet").rows  # without the features, class labels are numbers
    assert [r.label for r in parquet] == ["1", "0"]
    assert np.asarray(open_image(parquet[0].image))[0, 0].tolist() == [5, 10, 200]


def test_json_of_an_image_row_keeps_its_caption():
    row = rows.read([{"image": "data:image/png;base64,AAAA", "label": "x", "text": "a thing"}]).rows[0]
    assert json.loads(json.dumps(row.to_json()))["text"] == "a thing"


def test_noisy_digits_are_wrong_in_one_way_and_their_captions_know_better():
    pytest.importorskip("sklearn")
    from residency import embedded

    noisy = rows.read(embedded.data("noisy-digits/noisy")).rows
    clean = rows.read(embedded.data("noisy-digits/examples")).rows
    test = rows.read(embedded.data("noisy-digits/test")).rows
    assert len({r.image for r in noisy} | {r.image for r in clean} | {r.image for r in test}) == 1097 + 30 + 500
    wrong = [r for r in noisy if r.tag != f"shows {r.label}"]
    assert 0.25 < len(wrong) / len(noisy) < 0.35
    assert len({(r.tag, r.label) for r in wrong}) == 10
    word = {str(i): w for i, w in enumerate(embedded.WORDS)}
    told = [r for r in wrong if word[r.tag[-1]] in r.text]
    mistold = [r for r in wrong if word[r.label] in r.text]
    assert len(told) > 1.5 * len(mistold) > 0


def test_dialogues_are_the_same_question_only_with_the_same_context():
    from residency.run import question_key

    turns = [{"speaker": "A", "text": "Did you win?"}, {"speaker": "B", "text": "Yeah."}]
    other = [{"speaker": "A", "text": "Is it over?"}, {"speaker": "B", "text": "Yeah."}]
    first, second, again = rows.read(
        [{"dialogue": d, "label": label} for d, label in ((turns, "joy"), (other, "sadness"), (turns, "anger"))]
    ).rows
    assert question_key(first) != question_key(second)
    assert question_key(first) == question_key(again)
