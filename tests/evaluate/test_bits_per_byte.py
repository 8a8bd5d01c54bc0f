"""Bits per byte against the loss of transformers, torchmetrics' perplexity and arithmetic by hand."""

import math

import pytest
import torch
import transformers as tf

from residency.errors import DataError
from residency.evaluate.bits_per_byte import BitsPerByte, bits_per_byte


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(
        tf.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    ).eval()


TEXTS = ["a wall", "año 日本 🏠", "x", "the permit is free of charge"]


def test_is_the_loss_of_transformers_over_the_bytes(model):
    ids = [list(text.encode()) for text in TEXTS]  # a byte is a token here
    prompts = [[1, 2, 3 + i] for i in range(4)]
    score = bits_per_byte(model, list("abcd"), prompts, ids, TEXTS)
    nats = 0.0
    for prompt, answer in zip(prompts, ids, strict=True):
        rows = torch.tensor([prompt + answer])
        labels = rows.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            nats += float(model(input_ids=rows, labels=labels).loss) * len(answer)
    size = sum(len(text.encode()) for text in TEXTS)
    assert score.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert score.n == 4
    assert score.low < score.value < score.high


def test_is_the_logarithm_of_torchmetrics_perplexity(model):
    text = pytest.importorskip("torchmetrics.text")
    answer = list(TEXTS[3].encode())
    score = bits_per_byte(model, ["a"], [[1]], [answer], [TEXTS[3]])
    perplexity = text.Perplexity()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, *answer]])).logits[:, :-1]
    perplexity.update(logits, torch.tensor([answer]))
    assert score.value == pytest.approx(math.log2(float(perplexity.compute())), rel=1e-5)


def test_ratio_of_sums_and_not_mean_of_ratios():
    metric = BitsPerByte()
    metric.update("short", -8 * math.log(2), "a")
    metric.update("long", -1 * math.log(2), "é" * 50)
    score = metric.compute()
    assert score.value == pytest.approx(9 / 101)
    assert {i.id: i.score for i in score.items} == pytest.approx({"short": 8.0, "long": 0.01})


def test_difference_is_that_of_the_two_values():
    before, after = BitsPerByte(), BitsPerByte()
    for i in range(30):
        before.update(str(i), -2.0 * (i + 1), "x" * (i + 1))
        after.update(str(i), -1.0 * (i + 1), "x" * (i + 1))
    a, b = before.compute(), after.compute()
    found = before.difference(a, b)
    assert found.difference == pytest.approx(b.value - a.value)
    assert found.low == pytest.approx(found.difference)  # every item improves by the same ratio
    assert before.flips(a, b) == ([], [])
    assert not BitsPerByte.higher_is_better


def test_merge():
    def scored(ids):
        metric = BitsPerByte()
        for i in ids:
            metric.update(str(i), -float(i + 1), "x" * (1 + i % 3))
        return metric

    assert scored(range(5)).merge(scored(range(5, 9))).compute() == scored(range(9)).compute()


def test_no_bytes_no_items_and_no_number_are_refused():
    with pytest.raises(DataError, match="empty"):
        BitsPerByte().update("a", 0.0, "")
    with pytest.raises(DataError, match="no items"):
        BitsPerByte().compute()
    with pytest.raises(DataError, match="not finite"):
        BitsPerByte().update("a", float("nan"), "x")
