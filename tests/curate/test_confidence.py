"""Entropy, confidence, margins and EL2N: bounds, order, and what they say of models that are sure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from residency.curate.confidence import EL2N, LeastConfidence, Margin, TokenEntropy
from residency.curate.reading import read
from residency.testing.cases.quality import model_and_tokenizer, rows_to_read
from residency.testing.tinyllama import tiny_llama

SCORES = [TokenEntropy(), LeastConfidence(), LeastConfidence(form="whole"), Margin(), Margin(form="least"), EL2N()]


def scaled(factor: float):
    """Readings of one model whose logits are multiplied: from knowing nothing to being certain."""
    model = tiny_llama(vocab_size=259)
    model.lm_head.weight.mul_(factor)
    return read(model, model_and_tokenizer()[1], rows_to_read()[:-1], SCORES)


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0, 30.0, 1e4])
def test_values_stay_in_their_bounds(factor):
    found = scaled(factor)
    tops = [math.log(259), 1, 1, 1, 1, math.sqrt(2)]
    for score, top in zip(SCORES, tops, strict=True):
        values = score.score(found)
        assert np.isfinite(values).all(), score
        assert (values >= 0).all(), score
        assert (values <= top * (1 + 1e-6)).all(), score


def test_a_surer_model_has_less_entropy_and_wider_margins():
    timid, bold = scaled(0.5), scaled(2.0)
    assert (TokenEntropy().score(bold) < TokenEntropy().score(timid)).all()
    assert (LeastConfidence().score(bold) < LeastConfidence().score(timid)).all()
    assert (Margin().score(bold) > Margin().score(timid)).all()


def test_the_least_margin_is_below_the_mean_and_the_whole_above_the_mean_of_least_confidence():
    found = read(*model_and_tokenizer(), rows_to_read()[:-1], SCORES)
    assert (Margin(form="least").score(found) <= Margin().score(found)).all()
    assert (LeastConfidence(form="whole").score(found) >= LeastConfidence().score(found)).all()


def test_infinite_logits_of_forbidden_words_do_not_spoil_the_entropy():
    model = tiny_llama(vocab_size=259)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(259).index_fill(0, torch.tensor([258]), -torch.inf))
    found = read(model, model_and_tokenizer()[1], rows_to_read()[:3], SCORES)
    for score in SCORES:
        assert np.isfinite(score.score(found)).all(), score
