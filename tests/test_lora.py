"""LoRA through PEFT: what the common suite does not cover."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from residency import bases, embedded
from residency.errors import PlanError
from residency.lora import Lora, merge


@pytest.fixture
def model():
    return bases.load_causal_lm(embedded.base_folder("tiny-llama"))


def test_scale_defaults_to_one_and_alpha_is_read(model):
    assert Lora(rank=8).attach(model).peft_config["default"].lora_alpha == 8
    model = bases.load_causal_lm(embedded.base_folder("tiny-llama"))
    assert Lora(rank=8, alpha=32, dropout=0.5).attach(model).peft_config["default"].lora_alpha == 32


def test_all_linear_takes_every_layer_but_the_head(model):
    names = {n.rsplit(".", 1)[-1] for n in Lora(rank=1, targets=("all-linear",)).attach(model).targeted_module_names}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("targets", [("no_such",), ("q_proj", "kproj"), ("proj",)])
def test_targets_that_match_nothing_are_refused_with_the_list(model, targets):
    with pytest.raises(PlanError, match="its linear layers: down_proj, gate_proj"):
        Lora(targets=targets).attach(model)


def test_merge_reports_the_drift_it_measured(model):
    adapted = Lora(rank=2).attach(model)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = adapted.eval()(ids).logits
    plain, drift = merge(adapted, ids)
    with torch.no_grad():
        after = plain(ids).logits
    assert drift == pytest.approx((after - before).abs().max().item(), abs=1e-7)
    assert drift < 1e-5
    assert not [n for n, _ in plain.named_modules() if "lora" in n]


@pytest.mark.parametrize("bad", [{"rank": 0}, {"dropout": 1.0}, {"alpha": -1}])
def test_values_out_of_range(bad):
    with pytest.raises(ValidationError):
        Lora(**bad)
