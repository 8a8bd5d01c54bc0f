"""The adapter to kronfluence: without the package a clear refusal, with it the inner products of our own gradients."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from residency import tokens
from residency.curate.ekfac import EKFAC
from residency.curate.gradients import row_gradients, trained
from residency.errors import MissingError
from residency.testing.tinyllama import tiny_llama


def encoded(*lengths):
    g = torch.Generator().manual_seed(0)
    return [
        tokens.Encoded(str(i), *(tuple(torch.randint(0, 61, (n,), generator=g).tolist()) for n in pair))
        for i, pair in enumerate(lengths)
    ]


def test_without_the_package_it_says_what_to_install(monkeypatch):
    for name in ("kronfluence", "kronfluence.analyzer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingError, match=r"residency\[influence\]"):
        EKFAC().pairs(tiny_llama(), encoded((2, 2)), encoded((2, 2)), 0)


def test_with_it_an_identity_hessian_gives_inner_products_and_the_model_stays():
    pytest.importorskip("kronfluence.analyzer")
    model = tiny_llama(tie_word_embeddings=False, num_hidden_layers=1)
    items, trusted = encoded((3, 4), (7, 1), (2, 9), (5, 5), (1, 3)), encoded((2, 2), (4, 3))
    found = EKFAC(strategy="identity", batch=2).pairs(model, items, trusted, 0)
    assert not any(p.requires_grad for p in model.parameters())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.requires_grad_()
    parameters = trained(model)
    g, h = (row_gradients(model, tokens.collate(rows, 0), parameters, "sum") for rows in (items, trusted))
    np.testing.assert_allclose(found, (g @ h.T).numpy(), rtol=1e-4, atol=1e-4)
    state = torch.get_rng_state()
    curved = EKFAC(batch=2).pairs(model, items, items, 0)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(EKFAC(batch=2).pairs(model, items, items, 0), curved)
    assert curved.shape == (5, 5)
    # an inverse Hessian is positive: a row helps itself
    assert (np.diag(curved) > 0).all()
    assert not np.allclose(curved, (g @ g.T).numpy())
