"""What an objective is told before an epoch: all rows seen, rows chosen, prepared once even when killed in between."""

from __future__ import annotations

import pytest
import torch

from residency import train
from residency.errors import ResidencyError
from residency.objective import Objective
from residency.sampler import LengthGrouped
from residency.trainable import Adapter
from residency.trainparams import TrainParams
from residency.views import Item, collate_views
from stopping import StopAfter, Stopped

PARAMS = TrainParams(batch=3, epochs=3, checkpoint_seconds=0, precision="float32", learning_rate=1e-2)


def items(n: int = 20, width: int = 4, views: int = 3) -> list[Item]:
    generator = torch.Generator().manual_seed(0)
    return [
        Item(i, f"row {i}", i % 2, torch.randn(views, width, generator=generator), clean=i % 5 == 0) for i in range(n)
    ]


class Half(Objective):
    """Trains a head on the half of the rows whose loss was highest when the epoch began."""

    wants = "features"

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 2)
        torch.nn.init.eye_(self.head.weight[:, :2].data)
        self.register_buffer("seen", torch.full((3, 20), -1.0))
        self.told: list[tuple[int, int]] = []
        self.trained: list[list[int]] = []
        self.wrong = wrong

    def rows_per_epoch(self, rows: int) -> int:
        return rows // 2

    def begin_epoch(self, epoch, epochs, look):
        self.told.append((epoch, epochs))
        order, found = [], []
        for outputs, batch in look():
            assert not outputs.features.requires_grad
            logits = self.head(outputs.features)
            found.append(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
            order += batch["rows"].tolist()
        assert order == list(range(20))
        self.seen[epoch] = torch.cat(found).detach()
        torch.rand(7)  # random numbers drawn here are the epoch's own
        return self.seen[epoch].topk(10 - self.wrong).indices.tolist()

    def count(self, batch):
        return len(batch["labels"])

    def forward(self, outputs, batch):
        self.trained.append(batch["rows"].tolist())
        logits = self.head(outputs.features)
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"), torch.tensor(len(logits))


def fit(scratch, progress=None, wrong=0):
    torch.manual_seed(0)
    model, objective = Adapter(4, 8), Half(wrong)
    log = train.fit(
        model, objective, items(), PARAMS, pad=0, scratch=scratch, progress=progress, collator=collate_views, seed=1
    )
    return model, objective, log


def test_epochs_train_on_the_rows_chosen(tmp_path):
    _, objective, log = fit(tmp_path)
    assert objective.told == [(0, 3), (1, 3), (2, 3)]
    assert log.steps == 12  # 10 rows in batches of 3, three times
    for epoch in range(3):
        mine = sorted(row for batch in objective.trained[4 * epoch : 4 * epoch + 4] for row in batch)
        assert mine == sorted(objective.seen[epoch].topk(10).indices.tolist())


@pytest.mark.parametrize("stop", [2, 4, 5, 8, 11])
def test_resume_is_bit_exact_within_an_epoch_and_between_two(tmp_path, stop):
    whole, objective, log = fit(tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", StopAfter(stop))
    again, resumed, again_log = fit(tmp_path / "cut")
    assert again_log.resumed_from == stop
    assert resumed.told == [(e, 3) for e in range(-(-stop // 4), 3)]
    assert torch.equal(resumed.seen, objective.seen)
    assert again_log.loss == log.loss
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_choice_of_another_size_than_announced_is_refused(tmp_path):
    with pytest.raises(ResidencyError, match="chose 9 rows but announced 10"):
        fit(tmp_path, wrong=1)


def test_the_sampler_keeps_to_the_rows_chosen():
    sampler = LengthGrouped([5] * 30, step=4, seed=0, rows=7)
    sampler.chosen = [3, 5, 7, 11, 13, 17, 19]
    first = list(sampler)
    assert sorted(first) == sampler.chosen
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert len(sampler) == 7


def test_strong_views_are_never_the_plain_one():
    rows = items(6)
    batch = collate_views(rows)
    for i, item in enumerate(rows):
        assert torch.equal(batch["features"][i], item.features[0])
        assert any(torch.equal(batch["strong"][i], view) for view in item.features[1:])
    assert batch["clean"].tolist() == [i % 5 == 0 for i in range(6)]
    alone = collate_views(items(2, views=1))
    assert torch.equal(alone["strong"], alone["features"])
    many = collate_views([Item(0, "a", torch.tensor([1.0, 0.0]), torch.zeros(1, 4))])
    assert many["labels"].tolist() == [[1.0, 0.0]]


def test_an_adapter_begins_as_what_it_stands_on(tmp_path):
    features = torch.randn(50, 6) * 3 + 1
    adapter = Adapter(6, 16).standardise(features)
    out = adapter(features).features
    torch.testing.assert_close(out.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(6))
    torch.nn.init.normal_(adapter.inner[2].weight)
    (tmp_path / "config.json").write_text("{}")
    adapter.save(tmp_path)
    import json

    config = json.loads((tmp_path / "config.json").read_text())
    again = Adapter.load(tmp_path, config)
    assert torch.equal(again(features).features, adapter(features).features)
    assert Adapter.load(tmp_path, {}) is None
