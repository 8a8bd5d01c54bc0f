"""Weakened models, perturbed questions and generated answers leave the model alone and depend on the row only."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch

from residency.curate.forward import Reader
from residency.curate.probes import Greedy, Perturbed, Subnets, weakened, without_words
from residency.curate.reading import encoded
from residency.rows import Row
from residency.testing.cases.quality import model_and_tokenizer, rows_to_read
from residency.testing.tinyllama import tiny_llama


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3]])).logits


def test_a_weakened_model_loses_the_share_it_was_told_and_is_whole_again_afterwards():
    model = tiny_llama(hidden_size=512, num_hidden_layers=1, num_attention_heads=8)
    before = logits(model)
    layer = model.model.layers[0].self_attn.q_proj
    with weakened(model, 0.3, "a"), torch.no_grad():
        probed = layer(torch.eye(512)).T / layer.weight  # column by column: 0 or 1 / (1 − 0.3)
        kept = (probed[0] != 0).float()
        assert abs(1 - kept.mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 512)
        torch.testing.assert_close(probed[0], kept / 0.7, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(logits(model), before)
    torch.testing.assert_close(logits(model), before)
    assert not layer._forward_pre_hooks


def test_the_head_is_never_weakened_and_seeds_differ():
    model = tiny_llama()
    with weakened(model, 0.5, "a"), torch.no_grad():
        x = torch.ones(1, 32)
        torch.testing.assert_close(model.lm_head(x), x @ model.lm_head.weight.T)
        first = logits(model)
    with weakened(model, 0.5, "a"):
        assert torch.equal(logits(model), first)
    with weakened(model, 0.5, "b"):
        assert not torch.equal(logits(model), first)


def test_hooks_go_even_when_something_fails():
    model = tiny_llama()
    with pytest.raises(RuntimeError), weakened(model, 0.5, "a"):
        raise RuntimeError
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_gpt2_style_layers_are_weakened_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, initializer_range=0.4)).eval()
    before = logits(model)
    with weakened(model, 0.5, "a"):
        assert not torch.allclose(logits(model), before)


def test_stronger_weakening_predicts_worse_where_the_model_was_sure():
    """A model that predicts its own greedy text: the more inputs are missing, the less likely that text is."""
    model = tiny_llama()
    own = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=60, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    from residency.curate.reading import Entry

    row = Row(id="x", messages=(("user", "a"), ("assistant", "b")))
    entry = Entry(row, (5, 6, 7), tuple(own))
    with Reader(model, None) as reader:
        nll = [Subnets((rate,), 0).run(reader, [entry])["nll"][0] for rate in (0.01, 0.2, 0.6)]
    assert nll[0] < nll[1]
    assert nll[0] < nll[2]


def test_words_are_dropped_at_the_rate_and_one_always_stays():
    random, words = Random(0), " ".join(f"w{i}" for i in range(2_000))
    left = without_words(words, 0.2, random).split()
    assert abs(len(left) / 2_000 - 0.8) < 5 * math.sqrt(0.16 / 2_000)
    assert left == sorted(left, key=lambda w: int(w[1:]))
    assert without_words("one two", 1.0, random) == "one"
    assert without_words("two  spaces\nstay", 0.0, random) == "two  spaces\nstay"


def test_perturbed_prompts_change_the_last_question_and_nothing_else():
    tokenizer = model_and_tokenizer()[1]
    row = Row(
        id="x",
        messages=(
            ("system", "be brief"),
            ("user", "a b c d"),
            ("assistant", "e"),
            ("user", "f g h i"),
            ("assistant", "j"),
        ),
    )
    entry, _ = encoded(row, tokenizer, 1_000)
    prompts = {tokenizer.decode(list(p)) for p in Perturbed(20, 0.5, 0).prompts(entry, tokenizer)}
    assert len(prompts) > 5
    head, tail = tokenizer.decode(list(entry.prompt)).split("f g h i")
    for prompt in prompts:
        assert prompt.startswith(head)
        assert prompt.endswith(tail)
        assert set(prompt[len(head) : len(prompt) - len(tail)].split()) <= {"f", "g", "h", "i"}


def test_a_question_of_one_word_has_no_uncertainty():
    model, tokenizer = model_and_tokenizer()
    row = Row(id="x", messages=(("user", "why?"), ("assistant", "so")))
    with Reader(model, tokenizer) as reader:
        found = Perturbed(4, 0.9, 0).run(reader, [encoded(row, tokenizer, 100)[0]])
    np.testing.assert_allclose([found["token"][0], found["answer"][0]], 0, atol=1e-6)


def test_greedy_is_generate_even_where_the_checkpoint_asks_for_a_penalty():
    model, tokenizer = model_and_tokenizer()
    entries = [encoded(row, tokenizer, 1_000)[0] for row in rows_to_read()[:6]]
    with Reader(model, tokenizer, 300) as reader:
        plain = Greedy(8).run(reader, entries)["hits"]
        old = model.generation_config.repetition_penalty
        model.generation_config.repetition_penalty = 50.0
        try:
            np.testing.assert_array_equal(Greedy(8).run(reader, entries)["hits"], plain)
        finally:
            model.generation_config.repetition_penalty = old
