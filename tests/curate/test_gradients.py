"""Gradients of rows: autograd one by one, torch's own AdamW, finite differences, and what a projection keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import qa
from residency import bases, embedded, rows, tokens
from residency.curate import gradients
from residency.curate.gradients import Adam, Gradients, Projection, row_gradients, row_losses, trained
from residency.lora import Lora
from residency.testing.tinyllama import tiny_llama

LENGTHS = ((3, 4), (7, 1), (2, 9), (5, 5))


def batch_of(*lengths):
    g = torch.Generator().manual_seed(0)
    items = [
        tokens.Encoded(str(i), *(tuple(torch.randint(0, 61, (n,), generator=g).tolist()) for n in pair))
        for i, pair in enumerate(lengths)
    ]
    return items, tokens.collate(items, 0)


def adapted(**changes):
    torch.manual_seed(0)
    model = Lora(rank=3, dropout=0.5).attach(tiny_llama(**changes))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def one_by_one(model, items, parameters, reduce="mean"):
    """Hugging Face's own loss of one row without padding, and autograd."""
    found = []
    for item in items:
        labels = torch.tensor([[-100] * len(item.prompt) + list(item.answer)])
        loss = model(input_ids=torch.tensor([item.prompt + item.answer]), labels=labels).loss
        loss = loss * len(item.answer) if reduce == "sum" else loss
        grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


def head(model):
    model.lm_head.weight.requires_grad_()


def last_block(model):
    model.model.layers[-1].requires_grad_()


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_rows_of_a_padded_batch_have_the_gradients_of_autograd_one_by_one(reduce):
    model, (items, batch) = adapted().train(), batch_of(*LENGTHS)
    parameters = trained(model)
    found = row_gradients(model, batch, parameters, reduce)
    expected = one_by_one(model.eval(), items, parameters, reduce)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.abs().amax(1).min() > 0.1
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("train", "shared"), [(head, True), (last_block, False)])
def test_so_have_a_head_and_a_whole_block_with_its_norms(train, shared):
    model, (items, batch) = tiny_llama(tie_word_embeddings=False), batch_of(*LENGTHS)
    train(model)
    parameters = trained(model)
    assert (gradients._linear(model, parameters) is not None) == shared
    found = row_gradients(model, batch, parameters, "mean")
    torch.testing.assert_close(found, one_by_one(model, items, parameters), rtol=1e-5, atol=1e-5)


def test_a_head_that_is_also_the_embedding_gets_both_gradients():
    model, (items, batch) = tiny_llama(tie_word_embeddings=True), batch_of(*LENGTHS)
    model.lm_head.weight.requires_grad_()
    parameters = trained(model)
    assert len(parameters) == 1
    found = row_gradients(model, batch, parameters, "mean")
    torch.testing.assert_close(found, one_by_one(model, items, parameters), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_with_a_bias_that_is_used_twice_and_two_with_one_weight(tied):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.layer = torch.nn.Embedding(61, 61), torch.nn.Linear(61, 61)
            self.inside.requires_grad_(False)
            self.again = torch.nn.Linear(61, 61) if tied else self.layer
            self.again.weight = self.layer.weight

        def forward(self, input_ids, **_):
            once = self.layer(self.inside(input_ids))
            return type("Out", (), {"logits": self.again(once.tanh())})

    torch.manual_seed(0)
    model, (_, batch) = Twice(), batch_of(*LENGTHS)
    parameters = trained(model)
    assert len(parameters) == 2 + tied
    found = row_gradients(model, batch, parameters, "sum")
    losses = row_losses(model, batch, "sum")
    for i, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        torch.testing.assert_close(found[i], torch.cat([g.flatten() for g in grads]), rtol=1e-5, atol=1e-5)


def test_a_small_step_on_a_row_changes_a_loss_by_the_product_of_gradients():
    """TracIn's and LESS's first order: the error of the prediction falls with the square of the step."""
    model = adapted().double()
    _, batch = batch_of(*LENGTHS)
    parameters = trained(model)
    g = row_gradients(model, batch, parameters, "mean").double()
    predicted = -(g[1] @ g[0])
    errors = []
    for eta in (1e-3, 1e-4):
        before = row_losses(model, batch, "mean")[0].item()
        place = 0
        with torch.no_grad():
            for p in parameters.values():
                p -= eta * g[1][place : place + p.numel()].view_as(p)
                place += p.numel()
        after = row_losses(model, batch, "mean")[0].item()
        errors.append(abs(after - before - eta * float(predicted)))
        with torch.no_grad():
            place = 0
            for p in parameters.values():
                p += eta * g[1][place : place + p.numel()].view_as(p)
                place += p.numel()
    assert errors[0] > 0
    assert errors[1] < errors[0] / 30


def test_adams_direction_is_the_step_that_torch_takes_next():
    model, (items, batch) = adapted(), batch_of(*LENGTHS)
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0)
    with pytest.raises(ValueError, match="let it step at least once"):
        Adam.of(optimizer, parameters)
    for item in items[:3]:
        optimizer.zero_grad()
        row_losses(model, tokens.collate([item], 0), "mean").sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    state = Adam.of(optimizer, parameters)
    found = state.direction(row_gradients(model, batch, parameters, "mean"))
    before = torch.cat([p.detach().flatten().clone() for p in parameters.values()])
    row_losses(model, tokens.collate([items[3]], 0), "mean").sum().backward()
    optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in parameters.values()]) - before
    torch.testing.assert_close(found[3], -moved / 1e-3, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", ["sparse", "rademacher", "gaussian"])
def test_a_projection_is_linear_keeps_products_and_does_not_depend_on_the_batch(kind, monkeypatch):
    monkeypatch.setattr(gradients, "BLOCK", 40_000)  # several blocks, the last one not full
    torch.manual_seed(0)
    x = torch.randn(40, 1030 if kind != "sparse" else 90_000)
    p = Projection(kind=kind, size=400)
    found = p.project(x)
    assert found.shape == (40, 400)
    torch.testing.assert_close(p.project(x[7:9]), found[7:9], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(p.project(2 * x[:1] - x[1:2]), 2 * found[:1] - found[1:2], rtol=1e-3, atol=1e-2)
    norms = x.norm(dim=1)
    error = (found @ found.T - x @ x.T) / torch.outer(norms, norms)
    off = error[~torch.eye(40, dtype=bool)]
    # unbiased, standard deviation √(1/P) for rows at right angles, √(2/P) for a row with itself at most
    assert abs(off.mean()) < 4 / 400**0.5 / 40
    assert 0.9 < off.std() * 400**0.5 < 1.1
    assert error.diag().abs().max() < 4 * (2 / 400) ** 0.5
    other = Projection(kind=kind, size=400, seed=1).project(x[:1])
    assert abs(torch.nn.functional.cosine_similarity(other, found[:1])) < 0.25


def test_from_rows_to_an_array(monkeypatch):
    folder = embedded.base_folder("tiny-llama")
    tokenizer = bases.load_tokenizer(folder)
    model = Lora(rank=2).attach(bases.load_causal_lm(folder))
    raw = [{**qa(i), "output": "yes " * (1 + 9 * (i % 3))} for i in range(6)]
    raw[4]["output"] = "long " * 300
    found = Gradients(size=64, batch=4, max_tokens=256)
    given = rows.read(raw).rows
    result = found.of(model, tokenizer, given)
    assert result.shape == (6, 64)
    assert result.dtype == np.float32
    assert np.isnan(result).all(1).tolist() == [False] * 4 + [True, False]
    # batches and their padding do not matter, and the projection is the one of `Projection`
    np.testing.assert_allclose(
        found.model_copy(update={"batch": 1}).of(model, tokenizer, given), result, rtol=1e-3, atol=1e-5
    )
    item = tokens.encode(given[2], tokenizer)
    plain = row_gradients(model, tokens.collate([item], tokenizer.pad_token_id), trained(model), "mean")
    np.testing.assert_allclose(Projection(size=64).project(plain)[0], result[2], rtol=1e-3, atol=1e-5)
    n = plain.shape[1]
    signs = found.of(model, tokenizer, given[:1], Adam(torch.zeros(n), torch.zeros(n), 0))
    first = row_gradients(
        model, tokens.collate([tokens.encode(given[0], tokenizer)], tokenizer.pad_token_id), trained(model), "mean"
    )
    # Adam's first step is the sign of the gradient
    torch.testing.assert_close(
        torch.from_numpy(signs), Projection(size=64).project(first / (first.abs() + 1e-8)), rtol=1e-3, atol=1e-2
    )
    assert found.of(model, tokenizer, []).shape == (0, 64)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        trained(tiny_llama())
