"""Packed linear layers: the same product, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from residency import packed


@pytest.mark.skipif(not packed.available(), reason="this build of torch has no oneDNN kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_product(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 7, bias=False)).to(dtype).eval()
    for shape in ((1, 24), (8, 24), (2, 33, 24), (24,), (0, 24)):
        x = torch.randn(shape, dtype=dtype)
        with torch.inference_mode():
            plain = model(x)
            with packed.packed(model):
                assert "forward" in model[0].__dict__
                mine = model(x)
        assert mine.shape == plain.shape
        torch.testing.assert_close(mine, plain, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
    assert not any("forward" in layer.__dict__ for layer in model)


@pytest.mark.skipif(not packed.available(), reason="this build of torch has no oneDNN kernels")
def test_training_other_dtypes_and_subclasses_keep_their_own_way():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(4, 4), nn.Linear(4, 4), nn.Linear(4, 4).double()).eval()
    with packed.packed(model), packed.packed(model):  # nested: the outer one stays
        assert [("forward" in layer.__dict__) for layer in model] == [False, True, False]
        x = torch.randn(3, 4, requires_grad=True)
        model[1](x).sum().backward()  # with gradients: the plain product
        assert x.grad is not None
    assert not any("forward" in layer.__dict__ for layer in model)


def test_an_error_inside_restores_the_model():
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError), packed.packed(model):
        raise RuntimeError
    assert "forward" not in model.__dict__


def test_without_the_kernels_nothing_changes(monkeypatch):
    monkeypatch.setattr(packed, "available", lambda: False)
    model = nn.Linear(4, 4)
    with packed.packed(model):
        assert "forward" not in model.__dict__


@pytest.mark.skipif(not packed.available(), reason="this build of torch has no oneDNN kernels")
def test_weights_written_or_converted_inside_are_not_ignored():
    model, x = nn.Linear(6, 3, bias=False), torch.ones(2, 6)
    with packed.packed(model), torch.no_grad():
        model.weight.fill_(2.0)
        assert torch.equal(model(x), torch.full((2, 3), 12.0))
        model.double()
        assert torch.equal(model(x.double()), torch.full((2, 3), 12.0, dtype=torch.float64))


@pytest.mark.skipif(not packed.available(), reason="this build of torch has no oneDNN kernels")
@pytest.mark.parametrize("fast", [True, False])
def test_rough_modules_are_rounded_where_that_is_faster_and_the_others_are_not(monkeypatch, fast):
    if fast and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor does not multiply bfloat16")
    monkeypatch.setattr(packed, "fast_bf16", lambda device: fast)
    torch.manual_seed(0)
    exact, guess = nn.Linear(64, 48), nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8, bias=False))
    x = torch.randn(3, 64)
    with torch.inference_mode():
        plain = exact(x), guess(x)
        with packed.packed(exact, rough=[guess]):
            mine = exact(x), guess(x)
            assert mine[1].dtype == torch.float32
        half = guess.bfloat16()(x.bfloat16()).float()
    torch.testing.assert_close(mine[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[1], half if fast else plain[1], rtol=2e-2 if fast else 1e-5, atol=2e-2)
    assert bool((mine[1] - plain[1]).abs().max() > 1e-4) == fast
