"""Choice accuracy: ranking, ties, distractors, and the whole way on a model whose preferences are known."""

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.errors import DataError
from residency.evaluate.choice import ChoiceAccuracy, Question, choice_accuracy, distractors


def test_pmi_and_plain_likelihood_can_disagree():
    metric, plain = ChoiceAccuracy(), ChoiceAccuracy()
    # "yes" is likelier after everything; the question raises "ochre" far more
    metric.update("q", ["ochre", "yes"], [-6.0, -1.0], [-12.0, -1.5])
    plain.update("q", ["ochre", "yes"], [-6.0, -1.0])
    assert metric.compute().value == 1.0
    assert plain.compute().value == 0.0
    assert metric.compute().items[0].prediction == "ochre"
    assert plain.compute().items[0].prediction == "yes"


def test_a_tie_is_wrong_wherever_the_gold_stands():
    for gold in range(4):
        metric = ChoiceAccuracy()
        metric.update("q", list("abcd"), [-2.0] * 4, [-1.0] * 4, gold=gold)
        score = metric.compute()
        assert score.value == 0.0
        assert score.items[0].prediction != "abcd"[gold]


def test_equals_torchmetrics_accuracy_on_random_scores():
    torchmetrics = pytest.importorskip("torchmetrics")
    g = torch.Generator().manual_seed(0)
    scores, gold = torch.randn(200, 4, generator=g), torch.randint(0, 4, (200,), generator=g)
    metric = ChoiceAccuracy()
    for i in range(200):
        metric.update(str(i), list("abcd"), scores[i].tolist(), None, int(gold[i]))
    theirs = torchmetrics.classification.MulticlassAccuracy(4, average="micro")(scores, gold)
    assert metric.compute().value == pytest.approx(float(theirs))


def test_merging_halves_is_the_whole_and_padding_counts_once():
    def scored(ids):
        metric = ChoiceAccuracy()
        for i in ids:
            metric.update(str(i), ["x", "y"], [float(i % 3), 1.0])
        return metric

    whole = scored(range(20)).compute()
    assert scored(range(0, 20, 2)).merge(scored(range(1, 20, 2))).compute() == whole
    assert scored(range(12)).merge(scored(range(8, 20))).compute() == whole
    odd = ChoiceAccuracy()
    odd.update("0", ["x", "y"], [5.0, 1.0])
    with pytest.raises(DataError, match="two different results"):
        scored(range(3)).merge(odd)


def test_difference_and_flips_between_two_scores():
    before, after = ChoiceAccuracy(), ChoiceAccuracy()
    for i in range(40):
        before.update(str(i), ["x", "y"], [float(i % 2), 0.5])
        after.update(str(i), ["x", "y"], [float(i % 4 != 0), 0.5])
    a, b = before.compute(), after.compute()
    found = before.difference(a, b)
    assert found.difference == pytest.approx(b.value - a.value) == 0.25
    assert found.low < 0.25 < found.high
    assert found.n == 40
    fixed, broken = before.flips(a, b)
    assert set(fixed) == {str(i) for i in range(40) if i % 4 == 2}
    assert broken == []


@pytest.mark.parametrize(
    ("answers", "conditional", "unconditional", "error"),
    [
        (["a"], [-1.0], None, DataError),
        (["a", "a", "b"], [-1.0, -2.0, -3.0], None, DataError),
        (["a", "b"], [float("nan"), -1.0], None, DataError),
        (["a", "b"], [-1.0, -1.0], [float("-inf"), -1.0], DataError),
        (["a", "b"], [-1.0], None, ValueError),
        (["a", "b"], [-1.0, -2.0], [-1.0], ValueError),
    ],
)
def test_bad_items_are_refused(answers, conditional, unconditional, error):
    with pytest.raises(error):
        ChoiceAccuracy().update("q", answers, conditional, unconditional)


def test_scoring_an_item_twice_or_no_item_is_refused():
    metric = ChoiceAccuracy()
    with pytest.raises(DataError, match="no items"):
        metric.compute()
    metric.update("q", ["a", "b"], [1.0, 0.0])
    with pytest.raises(DataError, match="twice"):
        metric.update("q", ["a", "b"], [1.0, 0.0])


def test_finds_the_answers_a_model_was_taught_and_scores_each_distinct_answer_once():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = tf.AutoModelForCausalLM.from_config(config)
    prompts = [[1, 10 + i, 2] for i in range(6)]
    golds = [[30 + i, 40 + i % 3] for i in range(6)]
    rows = torch.tensor([p + g for p, g in zip(prompts, golds, strict=True)])
    labels = rows.clone()
    labels[:, :3] = -100
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        model(input_ids=rows, labels=labels).loss.backward()
        optimiser.step()
    texts = {str(i): f"answer {i}" for i in range(6)}
    wrong = distractors(texts, n=3)
    questions = [
        Question(
            str(i),
            prompts[i],
            [texts[j] for j in [str(i), *wrong[str(i)]]],
            [golds[int(j)] for j in [str(i), *wrong[str(i)]]],
        )
        for i in range(6)
    ]
    assert choice_accuracy(model, questions, [1, 2]).value == 1.0
    assert choice_accuracy(model, questions, None).value == 1.0
    shifted = [Question(q.id, prompts[(i + 1) % 6], q.answers, q.tokens, q.gold) for i, q in enumerate(questions)]
    assert choice_accuracy(model, shifted, [1, 2]).value < 0.5


answers = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.sampled_from(["Yes.", "yes", "no", "Maybe", "año", "日本", "never"]),
    min_size=1,
)


@given(answers, st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_distractors_are_distinct_others(items, n, seed):
    plain = {key: value.casefold().strip(".") for key, value in items.items()}
    if len(set(plain.values())) < n + 1:
        with pytest.raises(DataError, match="distinct answers"):
            distractors(items, n, seed)
        return
    drawn = distractors(items, n, seed)
    assert drawn == distractors(dict(reversed(items.items())), n, seed)
    for key, others in drawn.items():
        assert len({plain[key], *(plain[o] for o in others)}) == n + 1


def test_distractors_spread_over_the_pool_and_depend_on_the_seed():
    items = {str(i): f"answer {i}" for i in range(50)}
    drawn = distractors(items, 3, 0)
    used = {o for others in drawn.values() for o in others}
    assert len(used) > 40
    assert drawn != distractors(items, 3, 1)


def test_an_empty_answer_is_refused_and_punctuation_alone_is_an_answer():
    with pytest.raises(DataError, match="empty"):
        distractors({"a": " ", "b": "x"}, 1)
    assert distractors({"a": "?", "b": "!"}, 1) == {"a": ["b"], "b": ["a"]}
