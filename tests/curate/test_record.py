"""The record of a training: by hand from logits, and in the training loop, cut off and resumed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import qa
from residency import bases, embedded, rows, tokens, train
from residency.crossentropy import CrossEntropy
from residency.curate.forgetting import Forgetting
from residency.curate.record import Recorded, right
from residency.objective import IGNORE, Head, Outputs
from residency.trainparams import TrainParams
from stopping import StopAfter, Stopped


def test_what_is_right():
    assert right(Outputs(logits=torch.tensor([[1.0, 2], [3, 1]])), {"labels": torch.tensor([1, 1])}).tolist() == [
        True,
        False,
    ]
    # answers of one, two and four tokens; the model says 1 after everything
    labels = torch.tensor([[9, 1, IGNORE, IGNORE, IGNORE], [9, 1, 0, IGNORE, IGNORE], [9, 1, 0, 0, 1]])
    labels[:, 0] = IGNORE
    hidden = torch.zeros(3, 5, 2)
    hidden[..., 0] = 1
    head = Head(torch.tensor([[0.0, 0], [1, 0]]))
    for outputs in (Outputs(hidden=hidden, head=head), Outputs(logits=head(hidden))):
        assert right(outputs, {"labels": labels}, 0.5).tolist() == [True, True, True]
        assert right(outputs, {"labels": labels}, 0.6).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="works on features"):
        right(Outputs(features=torch.ones(1, 2)), {"labels": labels[:1]})


@pytest.fixture(scope="module")
def tiny():
    folder = embedded.base_folder("tiny-llama")
    tokenizer = bases.load_tokenizer(folder)
    raw = [{**qa(i), "output": "yes " * (1 + 2 * (i % 3))} for i in range(6)]
    items, _ = tokens.encode_all(rows.read(raw).rows, tokenizer, 512)
    return folder, tokenizer, items


def fitted(tiny, objective, scratch, progress=None):
    folder, tokenizer, items = tiny
    params = TrainParams(batch=1, epochs=4, learning_rate=0.01, precision="float32", checkpoint_seconds=0)
    return train.fit(
        bases.load_causal_lm(folder),
        objective,
        items,
        params,
        pad=tokenizer.pad_token_id,
        scratch=scratch,
        progress=progress,
    )


def test_a_training_is_the_same_with_a_record_and_the_record_is_what_the_model_says(tiny, tmp_path):
    objective = Recorded(CrossEntropy(), rows=6, epochs=6)
    assert fitted(tiny, objective, tmp_path / "a").loss == fitted(tiny, CrossEntropy(), tmp_path / "b").loss
    record = objective.record[:4]
    assert not record[0].any()  # the random model knows nothing,
    assert record[3].all()  # and six rows of "yes" are learned
    assert (objective.record[4:] == -1).all()
    columns = objective.columns()
    assert columns["right-4"].tolist() == [1.0] * 6
    assert np.isnan(columns["right-5"]).all()
    assert np.isfinite(Forgetting().score(columns)).all()


def test_a_record_outlives_a_kill(tiny, tmp_path):
    whole = Recorded(CrossEntropy(), rows=6, epochs=4)
    fitted(tiny, whole, tmp_path / "whole")
    cut = Recorded(CrossEntropy(), rows=6, epochs=4)
    with pytest.raises(Stopped):
        fitted(tiny, cut, tmp_path / "cut", StopAfter(15))
    resumed = Recorded(CrossEntropy(), rows=6, epochs=4)
    assert fitted(tiny, resumed, tmp_path / "cut").resumed_from
    assert torch.equal(resumed.record, whole.record)
