"""Perplexity and IFD: closed forms, a model that ignores its context, and real weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from residency.curate.fluency import IFD, AnswerTokens, Perplexity
from residency.curate.reading import Alone, Answer, Reading, read
from residency.rows import Row
from residency.testing.cases.quality import model_and_tokenizer, rows_to_read
from residency.testing.tinyllama import tiny_llama


def made(given, alone):
    n = len(given)
    found = {Answer(): {"nll": np.array(given)}, Alone(): {"nll": np.array(alone)}}
    return Reading(np.ones(n, np.int64), np.zeros(n, bool), found)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary():
    model, tokenizer = tiny_llama(vocab_size=259), model_and_tokenizer()[1]
    torch.nn.init.zeros_(model.lm_head.weight)
    found = read(model, tokenizer, rows_to_read()[:4], [Perplexity(), IFD()])
    np.testing.assert_allclose(Perplexity().score(found), 259, rtol=1e-5)
    np.testing.assert_allclose(IFD().score(found), 1, rtol=1e-6)


def without_context():
    """The model with attention that looks at nothing: a token is predicted from the one before, whatever came earlier."""
    model = tiny_llama(vocab_size=259)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    return model


@pytest.mark.parametrize("form", ["loss", "perplexity"])
def test_ifd_is_1_for_a_model_that_ignores_the_question(form):
    found = read(without_context(), model_and_tokenizer()[1], rows_to_read(), [IFD(form=form)])
    read_at_all = found.tokens > 0
    chat = np.array([row.chat for row in rows_to_read()]) & read_at_all
    np.testing.assert_allclose(IFD(form=form).score(found)[chat], 1, rtol=1e-5)
    attending = read(*model_and_tokenizer(), rows_to_read(), [IFD(form=form)])
    assert (abs(IFD(form=form).score(attending)[chat] - 1) > 1e-3).all()


def test_ifd_is_1_where_nothing_is_asked():
    row = Row(id="p", messages=(("user", ""), ("assistant", "3 4 5")), chat=False)
    found = read(*model_and_tokenizer(), [row], [IFD()])
    np.testing.assert_allclose(IFD().score(found), 1, rtol=1e-6)


def test_both_forms_are_above_1_for_the_same_rows_and_rank_others_differently():
    reading = made([2.0, 1.0, 3.0], [1.0, 2.0, 4.0])
    loss, perplexity = IFD().score(reading), IFD(form="perplexity").score(reading)
    np.testing.assert_allclose(loss, [2, 0.5, 0.75])
    np.testing.assert_allclose(perplexity, np.exp([1.0, -1, -1]))


def test_extreme_losses_stay_finite_or_nan():
    reading = made([800.0, 1e-9, 1.0, np.nan], [1.0, 900.0, 0.0, 1.0])
    assert np.isfinite(Perplexity().score(reading)[:3]).all()
    assert np.isnan(IFD().score(reading)[2:]).all()
    assert not np.isinf(IFD(form="perplexity").score(reading)).any()


def test_answer_tokens_need_no_pass():
    found = read(*model_and_tokenizer(), rows_to_read(), [AnswerTokens()])
    assert found.found == {}
    assert AnswerTokens().score(found)[0] == len(rows_to_read()[0].answer) + 1


@pytest.mark.embedded
def test_real_weights_find_mismatched_answers():
    from residency import bases, embedded

    folder = embedded.base_folder("smollm2-135m-instruct")
    model, tokenizer = bases.load_causal_lm(folder, "cpu"), bases.load_tokenizer(folder)
    rows = [r for r in embedded.data("construction-faq/test") if len(r["output"]) < 250][:6]
    # every answer after its own question and after another's, so that length and difficulty cancel
    pairs = [(i, i) for i in range(6)] + [((i + 2) % 6, i) for i in range(6)]
    asked = [
        Row(id=f"{q}-{a}", messages=(("user", rows[q]["instruction"]), ("assistant", rows[a]["output"])))
        for q, a in pairs
    ]
    found = read(model, tokenizer, asked, [IFD(), Perplexity()])
    for score in (IFD(), IFD(form="perplexity"), Perplexity()):
        right, wrong = np.split(score.score(found), 2)
        print(type(score).__name__, right.round(3), wrong.round(3))
        assert (wrong > right).sum() >= 5
    assert np.median(IFD().score(found)[:6]) < 1
