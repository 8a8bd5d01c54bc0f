"""The linear head on features: the suite's checks for a loss that does not look at its batch, and the saved form."""

from __future__ import annotations

import pytest
import torch

from residency.adapt.linear import LinearLoss
from residency.classifier import ClassHead
from residency.objective import Outputs
from residency.testing import check_method
from residency.testing.roles import FeatureLossCase


class LinearCase(FeatureLossCase):
    """Reference: torch.nn.functional.cross_entropy on features of length √D."""

    name = "linear"
    in_batch = False

    def objective(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LinearLoss(3, 5).double()

    def reference(self, objective, features, labels):
        logits = objective.head(features / features.norm(dim=1, keepdim=True) * 5**0.5)
        return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").detach())


def test_the_suite():
    check_method(LinearCase())


@pytest.mark.parametrize("wrong", [True, False])
def test_the_suite_notices_what_a_case_declares_wrongly(wrong):
    class Declared(LinearCase):
        in_batch = wrong

    if wrong:
        with pytest.raises(AssertionError, match="cutting_a_step"):
            check_method(Declared(), only="check_cutting_a_step")
    else:
        check_method(Declared(), only="check_cutting_a_step")


def test_the_saved_head_says_the_same_of_features_of_any_length():
    loss, z = LinearLoss(3, 5), torch.randn(20, 5)
    weight, bias = loss.class_head()
    head = ClassHead(["a", "b", "c"], weight, bias, torch.zeros(5), torch.ones(5), unit=True)
    mine = -head(7 * z)[torch.arange(20), torch.arange(20) % 3].sum()
    total, _ = loss(Outputs(features=z), {"labels": torch.arange(20) % 3})
    torch.testing.assert_close(mine, total)
