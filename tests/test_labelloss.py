"""The loss of labels against torch, and a fine-tuned classifier that learns, saves, loads and predicts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from residency import bases, classifier, embedded, rows, tokens, train
from residency.labelloss import LabelLoss, label_loss
from residency.trainparams import TrainParams


def test_against_torch():
    logits, classes = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    torch.testing.assert_close(label_loss(logits, classes), F.cross_entropy(logits, classes, reduction="sum"))
    numbers = torch.randn(6)
    torch.testing.assert_close(label_loss(logits[:, :1], numbers), F.mse_loss(logits[:, 0], numbers, reduction="sum"))
    with pytest.raises(ValueError, match="one output"):
        label_loss(logits, numbers)


@pytest.mark.parametrize("regression", [False, True])
def test_an_encoder_learns_separable_texts_and_survives_saving(tmp_path, regression):
    raw = [
        {"text": ("roof " if i % 2 else "sea ") * 3 + str(i), "label": str(float(i % 2)) if regression else "ab"[i % 2]}
        for i in range(24)
    ]
    folder = embedded.base_folder("tiny-text-encoder")
    tokenizer = bases.load_tokenizer(folder)
    classes = None if regression else ["a", "b"]
    items, refused = tokens.encode_labelled(rows.read(raw).rows, tokenizer, classes, 64)
    assert not refused
    head = {"num_labels": 1, "problem_type": "regression"} if regression else {"id2label": {0: "a", 1: "b"}}
    torch.manual_seed(0)
    model = bases.load_classifier(folder, **head)
    params = TrainParams(max_steps=40, batch=8, learning_rate=3e-3, precision="float32", checkpoint_seconds=1e9)
    log = train.fit(
        model,
        LabelLoss(),
        items,
        params,
        pad=tokenizer.pad_token_id,
        scratch=tmp_path / "scratch",
        collator=lambda batch: tokens.collate_labelled(batch, tokenizer.pad_token_id),
    )
    assert log.tokens == 24
    assert sum(log.loss[-5:]) < 0.3 * sum(log.loss[:5])
    bases.save(model, tokenizer, tmp_path / "model", "float32")
    said = list(classifier.load(tmp_path / "model").predict([r["text"] for r in raw], batch=5))
    if regression:
        assert all(abs(float(s) - i % 2) < 0.5 for i, s in enumerate(said))
    else:
        assert said == ["ab"[i % 2] for i in range(24)]


def test_rows_without_a_known_label_are_refused_with_the_reason():
    tokenizer = bases.load_tokenizer(embedded.base_folder("tiny-text-encoder"))
    found = rows.read(
        [{"text": "one", "label": "a"}, {"text": "two", "label": "c"}, {"prompt": "three", "completion": "four"}]
    ).rows
    kept, refused = tokens.encode_labelled(found, tokenizer, ["a", "b"], 64)
    assert [item.label for item in kept] == [0]
    assert len(refused) == 2
    assert "'c'" in refused[0].reason
    assert "no text with a label" in refused[1].reason
    kept, refused = tokens.encode_labelled(found, tokenizer, None, 64)
    assert not kept
    assert "could not convert" in refused[0].reason
