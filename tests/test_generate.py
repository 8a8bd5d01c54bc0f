"""Greedy generation: batches against a hand-written argmax loop, and hidden settings that must not matter."""

import pytest
import torch
import transformers as tf

from residency.errors import DataError
from residency.generate import generate


class Numbers:
    """A tokenizer whose texts are the ids, so that tests see every token."""

    pad_token_id: int | None = 0
    eos_token_id = 1

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        eos_token_id=1,
        bos_token_id=2,
    )
    return tf.AutoModelForCausalLM.from_config(config).eval()


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6], [20, 21, 22, 23]]


@torch.no_grad()
def by_hand(model, prompt, n, ends=(1,)):
    ids = list(prompt)
    for _ in range(n):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return " ".join(map(str, ids[len(prompt) :]))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_equal_argmax_by_hand(model, batch_size):
    expected = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    found = list(generate(model, Numbers(), PROMPTS, max_new_tokens=12, batch_size=batch_size))
    assert found == expected
    assert len(set(found)) > 1


def test_ends_where_it_is_told_to(model):
    whole = by_hand(model, PROMPTS[0], 10).split()
    stop = int(whole[3])
    found = next(generate(model, Numbers(), PROMPTS[:1], max_new_tokens=10, end=stop))
    assert found.split() == whole[: whole.index(str(stop))]
    model.generation_config.eos_token_id = [1, stop]
    assert next(generate(model, Numbers(), PROMPTS[:1], max_new_tokens=10)) == found


def test_the_checkpoints_own_sampling_and_penalties_are_ignored_and_kept(model):
    plain = list(generate(model, Numbers(), PROMPTS, max_new_tokens=10))
    config = model.generation_config
    config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, max_length=3)
    assert list(generate(model, Numbers(), PROMPTS, max_new_tokens=10)) == plain
    assert model.generation_config is config
    assert config.repetition_penalty == 9.0


def test_streams(model):
    calls = []
    model.generate, real = lambda **k: calls.append(1) or real(**k), model.generate
    texts = generate(model, Numbers(), PROMPTS, max_new_tokens=2, batch_size=1)
    next(texts)
    assert len(calls) == 1
    assert len(list(texts)) == 4


def test_no_pad_token_and_training_mode(model):
    class Bare(Numbers):
        pad_token_id = None

    model.train()
    assert list(generate(model, Bare(), PROMPTS, max_new_tokens=4)) == [by_hand(model.eval(), p, 4) for p in PROMPTS]
    model.train()
    list(generate(model, Bare(), PROMPTS[:1], max_new_tokens=1))
    assert model.training


def test_options_reach_generate(model):
    def three(model, input_ids, **_):
        return torch.cat([input_ids, torch.full((len(input_ids), 1), 3)], dim=1)

    assert list(generate(model, Numbers(), PROMPTS, custom_generate=three)) == ["3"] * 5


def test_bad_input_is_refused(model):
    assert list(generate(model, Numbers(), [])) == []
    with pytest.raises(DataError, match="prompt 1"):
        list(generate(model, Numbers(), [[1], []]))
    with pytest.raises(ValueError, match="batch_size"):
        list(generate(model, Numbers(), [[1]], batch_size=0))
