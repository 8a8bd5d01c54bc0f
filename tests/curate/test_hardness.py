"""Learning complexity, memorisation, prompt uncertainty: signs, bounds and what is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from residency.curate.hardness import LearningComplexity, Memorisation, PromptUncertainty
from residency.curate.reading import read
from residency.testing.cases.quality import memorised, model_and_tokenizer, rows_to_read
from residency.testing.tinyllama import tiny_llama


def test_a_model_that_knows_nothing_finds_all_rows_equally_hard():
    model = tiny_llama(vocab_size=259)
    torch.nn.init.zeros_(model.lm_head.weight)
    scores = [LearningComplexity(), LearningComplexity(form="confidence"), PromptUncertainty(times=2)]
    found = read(model, model_and_tokenizer()[1], rows_to_read()[:5], scores)
    for score, value in zip(scores, (np.log(259), 1 - 1 / 259, 0), strict=True):
        np.testing.assert_allclose(score.score(found), value, rtol=1e-5, atol=1e-7)


def test_both_forms_of_complexity_call_the_same_rows_hard():
    scores = [LearningComplexity(rates=(0.2,)), LearningComplexity(rates=(0.2,), form="confidence")]
    found = read(*model_and_tokenizer(), rows_to_read()[:-1], scores)
    a, b = (score.score(found) for score in scores)
    assert (np.argsort(a) == np.argsort(b)).all()  # of one subnet the second is 1 − exp(−the first)
    np.testing.assert_allclose(b, 1 - np.exp(-a))


def test_shared_subnets_are_run_once():
    assert LearningComplexity().passes() == LearningComplexity(form="confidence").passes()
    assert LearningComplexity().passes() != LearningComplexity(seed=1).passes()


def test_exact_and_forced_memorisation_agree_on_what_the_model_wrote_itself():
    from residency.rows import Row
    from residency.testing.cases.quality import Letters

    model, rows = model_and_tokenizer()[0], memorised()[0]
    scores = [Memorisation(over="answer"), Memorisation(over="answer", exact=True)]
    own = []
    for row in rows:
        ids = Letters()(row.prompt)["input_ids"]
        said = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0, len(ids) :]
        own.append(
            Row(
                id=row.id,
                messages=(("user", row.prompt), ("assistant", "".join(chr(0x4E00 + int(t)) for t in said))),
                chat=False,
            )
        )
    found = read(model, Letters(), own, scores)
    for score in scores:
        # all but the end-of-text token, which this model never writes
        np.testing.assert_allclose(score.score(found), 9 / 10)


def test_the_window_is_the_first_32_tokens():
    rows, found = memorised()
    first = Memorisation().score(found)
    short = [i for i, row in enumerate(rows) if len(row.answer) < 32]
    long = [i for i, row in enumerate(rows) if len(row.answer) >= 40]
    assert short
    assert long
    whole = Memorisation(over="answer").score(found)
    np.testing.assert_allclose(first[short], whole[short])
    np.testing.assert_allclose(first[long] * 32 % 1, 0, atol=1e-9)


@pytest.mark.parametrize("wrong", [{"rates": []}, {"rates": [1.0]}, {"rates": [0.0]}])
def test_rates_must_be_shares(wrong):
    with pytest.raises(ValueError, match="rates"):
        LearningComplexity(**wrong)


@pytest.mark.parametrize("wrong", [{"times": 0}, {"drop": 0}, {"drop": 1}])
def test_perturbations_must_perturb(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PromptUncertainty(**wrong)
