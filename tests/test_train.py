"""The training loop: the same gradient however a step is cut, exact resume, refused empty supervision."""

from __future__ import annotations

import pytest
import torch

from helpers import qa
from residency import bases, embedded, rows, store, tokens, train
from residency.crossentropy import CrossEntropy
from residency.errors import DataError, ResidencyError
from residency.objective import IGNORE, Objective
from residency.progress import Progress
from residency.trainparams import TrainParams
from stopping import StopAfter, Stopped

EXACT = {"precision": "float32", "warmup": 0.0, "clip": 1e9}


@pytest.fixture(scope="module")
def tiny():
    folder = embedded.base_folder("tiny-llama")
    tokenizer = bases.load_tokenizer(folder)
    # answers of very different lengths: a mean per micro-batch would weigh them wrongly
    raw = [{**qa(i), "output": "yes " * (1 + 9 * (i % 3))} for i in range(16)]
    items, _ = tokens.encode_all(rows.read(raw).rows, tokenizer, 512)
    return folder, tokenizer, items


def first_gradient(tiny, batch, accumulate, tmp_path, objective=None):
    folder, tokenizer, items = tiny
    model = bases.load_causal_lm(folder)
    caught = {}
    original = torch.optim.AdamW.step

    def spy(self, *a, **k):
        if not caught:
            caught.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return original(self, *a, **k)

    torch.optim.AdamW.step = spy
    try:
        params = TrainParams(batch=batch, accumulate=accumulate, max_steps=1, **EXACT)
        log = train.fit(
            model,
            objective or CrossEntropy(),
            items[:8],
            params,
            pad=tokenizer.pad_token_id,
            scratch=tmp_path / f"{batch}x{accumulate}",
        )
    finally:
        torch.optim.AdamW.step = original
    return caught, log


def test_gradient_does_not_depend_on_how_a_step_is_cut(tiny, tmp_path):
    """8×1, 4×2 and 2×4 with unequal lengths: one gradient, equal to the one of the whole batch by autograd."""
    folder, tokenizer, items = tiny
    whole, log = first_gradient(tiny, 8, 1, tmp_path)
    for batch, accumulate in ((4, 2), (2, 4), (1, 8)):
        cut, cut_log = first_gradient(tiny, batch, accumulate, tmp_path)
        for name, gradient in whole.items():
            torch.testing.assert_close(cut[name], gradient, rtol=2e-5, atol=1e-7, msg=f"{name} at {batch}x{accumulate}")
        assert cut_log.loss[0] == pytest.approx(log.loss[0], rel=1e-5)
    model = bases.load_causal_lm(folder)
    batch = tokens.collate(items[:8], tokenizer.pad_token_id)
    loss = model(**batch).loss  # transformers' own mean over answer tokens
    loss.backward()
    assert log.loss[0] == pytest.approx(loss.item(), rel=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(whole[name], p.grad, rtol=1e-4, atol=1e-6)


def test_fused_and_dense_cross_entropy_give_one_gradient(tiny, tmp_path):
    class Dense(CrossEntropy):
        wants = "logits"

    fused, _ = first_gradient(tiny, 8, 1, tmp_path)
    dense, _ = first_gradient(tiny, 8, 1, tmp_path / "dense", Dense())
    for name, gradient in fused.items():
        torch.testing.assert_close(dense[name], gradient, rtol=1e-4, atol=1e-7)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resume_is_bit_exact_at_every_step(tiny, tmp_path, stop):
    folder, tokenizer, items = tiny
    params = TrainParams(batch=4, accumulate=1, max_steps=6, checkpoint_seconds=0, precision="float32")

    def fit(scratch, progress=None):
        model = bases.load_causal_lm(folder)
        model.config.attention_dropout = 0.1  # randomness inside the model must be resumed too
        log = train.fit(
            model, CrossEntropy(), items, params, pad=tokenizer.pad_token_id, scratch=scratch, seed=3, progress=progress
        )
        return weights(model), log

    torch.manual_seed(3)
    whole, log = fit(tmp_path / "whole")
    torch.manual_seed(3)
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", StopAfter(stop))
    torch.manual_seed(99)
    resumed, resumed_log = fit(tmp_path / "cut")
    assert resumed_log.resumed_from == stop
    assert all(torch.equal(resumed[n], whole[n]) for n in whole)
    assert resumed_log.loss == log.loss


def test_a_damaged_checkpoint_is_skipped_and_named(tiny, tmp_path):
    folder, tokenizer, items = tiny
    params = TrainParams(batch=4, max_steps=4, checkpoint_seconds=0, precision="float32")
    with pytest.raises(Stopped):
        train.fit(
            bases.load_causal_lm(folder), CrossEntropy(), items, params, pad=0, scratch=tmp_path, progress=StopAfter(2)
        )
    (checkpoint,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = []
    progress = Progress()
    progress.say = said.append
    log = train.fit(
        bases.load_causal_lm(folder), CrossEntropy(), items, params, pad=0, scratch=tmp_path, progress=progress
    )
    assert log.resumed_from is None
    assert log.steps == 4
    assert any("skipping" in line and "model.safetensors" in line for line in said)


def test_checkpoints_hold_no_training_arguments_pickle(tiny, tmp_path):
    folder, tokenizer, items = tiny
    params = TrainParams(batch=4, max_steps=3, checkpoint_seconds=0, precision="float32")
    train.fit(bases.load_causal_lm(folder), CrossEntropy(), items, params, pad=0, scratch=tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    assert not (checkpoint / "training_args.bin").exists()
    assert store.damage(checkpoint, thorough=True) is None


def test_no_autocast_is_left_on_the_model(tiny, tmp_path):
    """After a bfloat16 training the model computes in float32 again, and merging an adapter costs no precision."""
    from residency.lora import Lora, merge

    folder, tokenizer, items = tiny
    adapted = Lora(rank=4).attach(bases.load_causal_lm(folder))
    params = TrainParams(max_steps=3, batch=4, precision="bfloat16", learning_rate=1e-2)
    log = train.fit(adapted, CrossEntropy(), items, params, pad=0, scratch=tmp_path)
    assert log.precision == "bfloat16"
    _, drift = merge(adapted, tokens.collate(items[:2], 0)["input_ids"])
    assert drift < 1e-5


def test_rows_that_train_nothing_are_refused(tiny, tmp_path):
    folder, tokenizer, items = tiny
    model = bases.load_causal_lm(folder)
    with pytest.raises(DataError, match="no rows"):
        train.fit(model, CrossEntropy(), [], TrainParams(), pad=0, scratch=tmp_path)
    empty = tokens.Encoded("x-7", (1, 2), ())
    with pytest.raises(DataError, match="x-7"):
        train.fit(model, CrossEntropy(), [*items, empty], TrainParams(), pad=0, scratch=tmp_path)


def test_an_objective_that_miscounts_is_caught(tiny, tmp_path):
    folder, tokenizer, items = tiny

    class Wrong(CrossEntropy):
        def forward(self, outputs, batch):
            total, count = super().forward(outputs, batch)
            return total, count + 1

    with pytest.raises(ResidencyError, match="announced"):
        train.fit(bases.load_causal_lm(folder), Wrong(), items, TrainParams(max_steps=1), pad=0, scratch=tmp_path)


def test_a_loss_that_is_no_number_stops_with_advice(tiny, tmp_path):
    folder, tokenizer, items = tiny

    class Broken(Objective):
        wants = "hidden"

        def forward(self, outputs, batch):
            return outputs.hidden.sum() * float("nan"), torch.tensor(self.count(batch))

    with pytest.raises(ResidencyError, match="learning-rate"):
        train.fit(bases.load_causal_lm(folder), Broken(), items, TrainParams(max_steps=1), pad=0, scratch=tmp_path)


def test_a_model_that_caps_its_logits_is_refused_by_the_fused_form():
    head = train.Head(torch.randn(11, 4))
    hidden = torch.randn(2, 3, 4)
    train.check_head(head, hidden, head(hidden[:, -1:]))
    with pytest.raises(ResidencyError, match="after the head"):
        train.check_head(head, hidden, 0.3 * torch.tanh(head(hidden[:, -1:])))


def test_labels_cover_answers_only(tiny):
    _, tokenizer, items = tiny
    batch = tokens.collate(items[:3], tokenizer.pad_token_id)
    for i, item in enumerate(items[:3]):
        trained = batch["labels"][i] != IGNORE
        assert trained.sum() == len(item.answer)
        assert tuple(batch["input_ids"][i][trained].tolist()) == item.answer
        assert not trained[: len(item.prompt)].any()


class _Weighted(CrossEntropy):
    """Cross-entropy with a trained factor, a count of steps as a buffer, and a schedule."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros(()))
        self.told = []

    def begin_step(self, step, steps):
        self.told.append((step, steps))
        self.seen += 1

    def forward(self, outputs, batch):
        total, count = super().forward(outputs, batch)
        return total * self.factor, count


def _fit_weighted(tiny, scratch, progress=None, **changed):
    folder, tokenizer, items = tiny
    model, objective = bases.load_causal_lm(folder), _Weighted()
    params = TrainParams(batch=2, accumulate=2, max_steps=5, checkpoint_seconds=0, **EXACT)
    try:
        train.fit(
            model, objective, items, params, pad=tokenizer.pad_token_id, scratch=scratch, progress=progress, **changed
        )
    except Stopped:
        return None
    return weights(model), objective


def test_an_objectives_own_parameters_and_buffers_are_trained_told_the_step_and_resumed(tiny, tmp_path):
    whole, objective = _fit_weighted(tiny, tmp_path / "whole")
    assert objective.told == [(i, 5) for i in range(5)]
    assert float(objective.factor) != 1.0
    assert _fit_weighted(tiny, tmp_path / "cut", StopAfter(2)) is None
    again, resumed = _fit_weighted(tiny, tmp_path / "cut")
    assert resumed.told[0][0] in (2, 3)
    assert torch.equal(resumed.factor, objective.factor)
    assert torch.equal(resumed.seen, objective.seen)
    assert all(torch.equal(again[n], whole[n]) for n in whole)


def test_learning_rates_by_name(tiny, tmp_path):
    folder, _, _ = tiny
    before = weights(bases.load_causal_lm(folder))
    still, frozen = _fit_weighted(tiny, tmp_path / "a", learning_rates={"objective.": 0.0, "mlp": 0.0})
    assert float(frozen.factor) == 1.0
    for name, tensor in still.items():
        assert torch.equal(tensor, before[name]) == ("mlp" in name), name


def test_the_objectives_gradient_is_clipped_with_the_models(tiny, tmp_path):
    folder, tokenizer, items = tiny
    model, objective, norms = bases.load_causal_lm(folder), _Weighted(), []
    original = torch.optim.AdamW.step

    def spy(self, *a, **k):
        every = [p.grad for p in (*model.parameters(), *objective.parameters()) if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in every]).norm().item())
        return original(self, *a, **k)

    torch.optim.AdamW.step = spy
    try:
        params = TrainParams(batch=4, max_steps=2, precision="float32", clip=0.01)
        train.fit(model, objective, items, params, pad=tokenizer.pad_token_id, scratch=tmp_path)
    finally:
        torch.optim.AdamW.step = original
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
