"""The dense and the fused form agree through a real model, in half precision too (the invariants are in the common suite)."""

from __future__ import annotations

import pytest
import torch

from residency.crossentropy import CrossEntropy
from residency.objective import Head, Outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_fused_agree(dtype):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 9, 6).to(dtype), torch.randn(31, 6).to(dtype), torch.randn(31).to(dtype)
    labels = torch.randint(0, 31, (2, 9))
    labels[:, :4] = -100
    head = Head(weight, bias)
    fused, n = CrossEntropy()(Outputs(hidden=hidden, head=head), {"labels": labels})
    dense, m = CrossEntropy()(Outputs(logits=head(hidden)), {"labels": labels})
    torch.testing.assert_close(fused.float(), dense.float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    assert int(n) == int(m) == 10
