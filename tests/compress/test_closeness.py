"""Closeness to the teacher against the definition, token by token."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from residency.compress import closeness
from residency.errors import DataError
from residency.tokens import Encoded, collate


def model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


ITEMS = [Encoded(f"r{i}", tuple(range(1, 4 + i)), tuple((7 * i + j) % 60 for j in range(3 + 9 * i))) for i in range(4)]


def test_against_the_definition():
    student, teacher = model(0), model(1)
    found = closeness.compare(student, teacher, [collate(ITEMS[:2], 0), collate(ITEMS[2:], 0)])
    overlap, divergence = {1: [], 8: []}, []
    for item in ITEMS:
        ids = torch.tensor([item.prompt + item.answer])
        at = slice(len(item.prompt) - 1, -1)
        with torch.no_grad():
            s, t = student(ids).logits[0, at], teacher(ids).logits[0, at]
        for k, shares in overlap.items():
            for a, b in zip(s.topk(k).indices.tolist(), t.topk(k).indices.tolist(), strict=True):
                shares.append(len(set(a) & set(b)) / k)
        kl = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)
        divergence += [(place, float(v)) for place, v in enumerate(kl, 1)]
    for k, shares in overlap.items():
        assert found.overlap[k] == pytest.approx(sum(shares) / len(shares), abs=1e-9)
    assert found.kl == pytest.approx(sum(v for _, v in divergence) / len(divergence), rel=1e-4)
    for bucket, (low, high) in enumerate(zip((1, 2, 3, 5, 9, 17, 33), (1, 2, 4, 8, 16, 32, 64), strict=True)):
        inside = [v for place, v in divergence if low <= place <= high]
        expected = pytest.approx(sum(inside) / len(inside), rel=1e-4) if inside else None
        assert found.by_place[bucket] == expected
    assert found.by_place[-1] is None


def test_a_model_is_nearest_to_itself_and_modes_are_restored():
    same = model(0).train()
    found = closeness.compare(same, same, [collate(ITEMS, 0)])
    assert found.overlap == {1: 1.0, 8: 1.0}
    assert abs(found.kl) < 1e-6
    assert same.training
    figure = closeness.figure(found, found)
    assert figure["series"][0]["x"] == ["1", "2", "3-4", "5-8", "9-16", "17-32"]


def test_no_answers_are_refused():
    with pytest.raises(DataError, match="no answer token"):
        closeness.compare(model(0), model(0), [])
