"""Judges: reading replies, batches, expected digits, reward models; none of it with a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from residency.curate.judging import DigitJudge, Judge, Reward, RewardModel, number_in
from residency.embedded import CHAT_TEMPLATE, byte_tokenizer
from residency.testing.tinyllama import tiny_llama


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("4", 4),
        (" 4.5 ", 4.5),
        ("**5**", 5),
        ("4/6", 4),
        ("4 out of 6.", 4),
        ("Score: 3", 3),
        ("The rating is **2**, as 5 points are missing", 2),
        ("rating = 6/6", 6),
        ("5. The answer names all 12 points.", 5),
        ("I give it a 3.", 3),
        ("-1", -1),
        ("Of 6 points I give 4", np.nan),
        ("good", np.nan),
        ("", np.nan),
        ("v2", np.nan),
        ("2024-11-03", np.nan),
    ],
)
def test_numbers_in_replies(reply, number):
    np.testing.assert_equal(number_in(reply), number)


def test_unreadable_replies_and_those_off_the_scale_are_nan():
    replies = iter(["3", "great", "9", "0"])
    found = Judge().score(["q"] * 4, ["a"] * 4, lambda messages: next(replies))
    np.testing.assert_equal(found, [3, np.nan, np.nan, np.nan])


def test_empty_rows_are_never_asked():
    asked = []
    Judge().score(["q", " ", "q"], ["a", "a", ""], lambda messages: asked.append(messages) or "3")
    assert len(asked) == 1
    assert [turn["role"] for turn in asked[0]] == ["user"]
    assert "q" in asked[0][0]["content"]


def test_a_judge_of_many_is_called_once_and_numbers_are_taken_as_they_are():
    class Many:
        calls = 0

        def many(self, conversations):
            self.calls += 1
            return [2.5 + i for i in range(len(conversations))]

    judge = Many()
    assert Judge().score(["q", "r"], ["a", "b"], judge).tolist() == [2.5, 3.5]
    assert judge.calls == 1


def test_complexity_does_not_show_the_answer():
    shown = Judge(aspect="complexity").messages("the question", "the secret")[0]["content"]
    assert "secret" not in shown
    assert "the question" in shown


def test_text_of_rows_is_not_read_as_a_template():
    shown = Judge(lowest=0, highest=5).messages("{answer} {lowest}", "{question}")[0]["content"]
    assert "{answer} {lowest}" in shown
    assert "{question}" in shown
    assert "From 0 (useless) to 5" in shown


def test_the_scale_must_rise():
    with pytest.raises(ValueError, match="below"):
        Judge(lowest=6, highest=6)


def digit_judge(bias=None, **more):
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    model = tiny_llama(vocab_size=len(tokenizer))
    if bias is not None:
        model.lm_head.weight.zero_()
        values = torch.zeros(len(tokenizer))
        for digit, value in bias.items():
            values[tokenizer(digit)["input_ids"][0]] = value
        model.lm_head.bias = torch.nn.Parameter(values)
    return DigitJudge(model, tokenizer, **more)


def test_the_expected_digit_of_equal_logits_is_the_middle_of_the_scale():
    ask = [{"role": "user", "content": "rate"}]
    assert digit_judge({})(ask) == pytest.approx(3.5)
    assert digit_judge({}, lowest=0, highest=5)(ask) == pytest.approx(2.5)


def test_the_expected_digit_is_a_softmax_over_the_digits_alone():
    ask = [{"role": "user", "content": "rate"}]
    assert digit_judge({"2": np.log(3.0), "x": 50.0}, lowest=1, highest=2)(ask) == pytest.approx(0.25 + 2 * 0.75)
    assert digit_judge({"6": 100.0})(ask) == pytest.approx(6)


def test_digits_are_the_same_alone_in_a_batch_and_by_hand():
    judge = digit_judge(batch_tokens=150)
    asks = [[{"role": "user", "content": "rate " * k}] for k in (1, 9, 3)]
    many = judge.many(asks)
    np.testing.assert_allclose([judge(ask) for ask in asks], many, rtol=1e-5)
    tokenizer = judge.tokenizer
    text = tokenizer.apply_chat_template(asks[1], tokenize=False, add_generation_prompt=True)
    with torch.no_grad():
        logits = judge.model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
    p = logits[[tokenizer(str(d))["input_ids"][0] for d in range(1, 7)]].double().softmax(0).numpy()
    assert many[1] == pytest.approx(float(p @ np.arange(1, 7)), rel=1e-5)
    assert judge.many([]) == []


def test_a_tokenizer_without_digit_tokens_is_refused():
    class Words:
        def __call__(self, text, **_):
            return {"input_ids": [7]}

        def decode(self, ids):
            return "<number>"

    with pytest.raises(ValueError, match="no token of its own"):
        DigitJudge(tiny_llama(), Words())
    with pytest.raises(ValueError, match="one digit"):
        DigitJudge(tiny_llama(), byte_tokenizer(None), highest=10)


def reward_model(kind):
    import transformers as t

    tokenizer = byte_tokenizer(CHAT_TEMPLATE if kind == "llama" else None)
    small = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.4}
    torch.manual_seed(0)
    if kind == "llama":
        return t.LlamaForSequenceClassification(t.LlamaConfig(**small, **more)).eval(), tokenizer
    return t.BertForSequenceClassification(t.BertConfig(**small, **more)).eval(), tokenizer


QUESTIONS, ANSWERS = ["why?", "what is it?", "q"], ["so", "a wall of " + "stone " * 9, "b"]


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("padded", [True, False])
def test_rewards_are_the_same_alone_in_a_batch_and_by_hand(kind, padded):
    model, tokenizer = reward_model(kind)
    if not padded:
        model.config.pad_token_id = None
    reward = RewardModel(model, tokenizer)
    found = Reward().score(QUESTIONS, ANSWERS, reward)
    for i in range(3):
        q, a = QUESTIONS[i], ANSWERS[i]
        np.testing.assert_allclose(reward([q], [a]), found[i], rtol=1e-4, atol=1e-5)
        if kind == "llama":
            turns = [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
            inputs = {
                "input_ids": torch.tensor(
                    [tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]]
                )
            }
        else:
            inputs = tokenizer(q, a, return_tensors="pt")
        with torch.no_grad():
            np.testing.assert_allclose(model(**inputs).logits.item(), found[i], rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01


def test_a_reward_model_has_one_logit():
    model, tokenizer = reward_model("bert")
    model.config.num_labels = 2
    with pytest.raises(ValueError, match="one logit"):
        RewardModel(model, tokenizer)


def test_rewards_of_the_wrong_shape_are_refused_and_empty_rows_have_none():
    with pytest.raises(ValueError, match="numbers for 2 rows"):
        Reward().score(["q", "q"], ["a", "a"], lambda q, a: [1.0])
    np.testing.assert_equal(Reward().score(["q", ""], ["a", "a"], lambda q, a: [1.0] * len(q)), [1, np.nan])
    assert len(Reward().score([], [], lambda q, a: [])) == 0
