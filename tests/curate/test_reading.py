"""Reading rows: the same numbers alone, in a batch, in any order; what alone means; cuts, empties, errors."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate import reading as module
from residency.curate.confidence import EL2N, LeastConfidence, Margin, TokenEntropy
from residency.curate.fluency import IFD, AnswerTokens, Perplexity
from residency.curate.hardness import LearningComplexity, Memorisation, PromptUncertainty
from residency.curate.reading import Alone, Answer, Reading, encoded, header, read, runs_of
from residency.embedded import CHAT_TEMPLATE, byte_tokenizer
from residency.rows import Row
from residency.testing.cases.quality import model_and_tokenizer, rows_to_read

ALL = [
    Perplexity(),
    IFD(),
    AnswerTokens(),
    TokenEntropy(),
    LeastConfidence(),
    Margin(),
    EL2N(),
    LearningComplexity(rates=(0.2,)),
    Memorisation(exact=True),
    PromptUncertainty(times=2),
]


def chat(asked, said, i=0):
    return Row(id=str(i), messages=(("user", asked), ("assistant", said)))


def everything(rows, **more):
    return read(*model_and_tokenizer(), rows, ALL, **more)


def same(a: Reading, b: Reading):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert a.found.keys() == b.found.keys()
    for which, arrays in a.found.items():
        for name, values in arrays.items():
            np.testing.assert_allclose(values, b.found[which][name], atol=1e-4, err_msg=f"{which} {name}")


def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order():
    rows = rows_to_read()
    whole = everything(rows)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    same(everything([rows[i] for i in order], batch_tokens=100), whole.take(order))
    same(everything(rows, batch_tokens=1), whole)
    for i in (0, len(rows) - 2):
        same(everything([rows[i]]), whole.take([i]))


def test_rows_read_in_several_chunks_come_out_the_same(monkeypatch):
    whole, done = everything(rows_to_read()), []
    monkeypatch.setattr(module, "CHUNK", 4)
    same(everything(rows_to_read(), progress=done.append), whole)
    assert sum(done) == len(rows_to_read()) * runs_of(ALL)  # Answer, Alone, 1 subnet, 1 generated, 2 perturbed + 1
    assert runs_of(ALL) == 7
    assert len(done) > 20


def test_equal_passes_are_made_once(monkeypatch):
    made = []
    for which in (Answer, Alone):
        run = which.run
        monkeypatch.setattr(which, "run", lambda self, *a, run=run: made.append(type(self)) or run(self, *a))
    read(*model_and_tokenizer(), rows_to_read(), [Perplexity(), EL2N(), IFD(), IFD(form="perplexity"), Margin()])
    assert made == [Answer, Alone]


def test_a_row_without_an_answer_has_no_value():
    rows = [chat("why?", "  "), chat("why?", "so"), Row(id="c", text="a text", label="x")]
    found = everything(rows)
    assert found.tokens.tolist() == [0, 3, 0]
    for score in ALL:
        assert np.isnan(score.score(found)).tolist() == [True, False, True], type(score).__name__


def test_no_rows_and_nothing_but_empty_rows():
    for rows in ([], [chat("why?", " ")]):
        found = everything(rows)
        for score in ALL:
            values = score.score(found)
            assert len(values) == len(rows)
            assert np.isnan(values).all()


def test_equal_rows_have_equal_values():
    found = everything([chat("why?", "so it is", i) for i in range(5)], batch_tokens=70)
    for score in ALL:
        values = score.score(found)
        np.testing.assert_allclose(values, values[0], atol=1e-6)


def test_a_pass_that_was_not_made_is_named():
    found = read(*model_and_tokenizer(), rows_to_read(), [Perplexity()])
    with pytest.raises(ValueError, match="Alone.*wanted"):
        IFD().score(found)


def test_alone_is_the_announced_answer_without_any_turn():
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    system = Row(id="s", messages=(("system", "be brief"), ("user", "why?"), ("assistant", "so")))
    assert tokenizer.decode(list(header(system, tokenizer))) == "<|im_start|>assistant\n"
    entry, cut = encoded(system, tokenizer, 100)
    assert tokenizer.decode(list(entry.answer)) == "so<|im_end|>"
    assert not cut


def test_alone_without_a_template_begins_with_the_first_special_token_there_is():
    tokenizer = byte_tokenizer(None)
    row = Row(id="p", messages=(("user", "1 2 "), ("assistant", "3")), chat=False)
    assert header(row, tokenizer) == (tokenizer.bos_token_id,)
    tokenizer.bos_token = None
    assert header(row, tokenizer) == (tokenizer.eos_token_id,)
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(ValueError, match="BOS, EOS nor PAD"):
        header(row, tokenizer)


def test_a_template_that_announces_nothing_begins_with_bos():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}")
    assert header(chat("why?", "so"), tokenizer) == (tokenizer.bos_token_id,)


def test_a_long_row_loses_the_end_of_its_answer_and_is_counted():
    model, tokenizer = model_and_tokenizer()
    rows = [chat("why?", "because it is so"), chat("why?", "so")]
    room = len(encoded(rows[0], tokenizer, 10_000)[0].prompt) + 4
    found = read(model, tokenizer, rows, [Perplexity(), IFD()], max_tokens=room)
    assert found.tokens.tolist() == [4, 3]
    assert found.cut.tolist() == [True, False]
    shorter = Row(id="x", messages=(("user", "1"), ("assistant", "abcdef")), chat=False)
    entry, cut = encoded(shorter, tokenizer, 4)  # one byte of prompt, three of the answer
    assert tokenizer.decode(list(entry.answer)) == "abc"
    assert cut


@pytest.mark.parametrize(("room", "left"), [(-5, 0), (0, 0), (1, 1)])
def test_a_prompt_that_fills_the_limit_leaves_nothing_to_read(room, left):
    row = chat("why is it?", "so")
    prompt = encoded(row, model_and_tokenizer()[1], 10_000)[0].prompt
    found = everything([row], max_tokens=len(prompt) + room)
    assert found.tokens.tolist() == [left]
    assert found.cut.tolist() == [True]
    assert np.isnan(Perplexity().score(found)).tolist() == [left == 0]


@pytest.mark.parametrize("limits", [{"batch_tokens": 0}, {"max_tokens": 1}])
def test_limits_must_be_positive(limits):
    with pytest.raises(ValueError, match="at least"):
        everything([], **limits)


def test_take_repeats_and_drops():
    whole = everything(rows_to_read())
    part = whole.take([3, 3, 0])
    assert len(part) == 3
    assert part.of(Answer(), "nll").tolist() == whole.of(Answer(), "nll")[[3, 3, 0]].tolist()


def test_a_hidden_answer_is_refused_with_the_row():
    from residency.errors import DataError

    backwards = (
        "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(DataError, match="does not continue"):
        read(model_and_tokenizer()[0], byte_tokenizer(backwards), [chat("why?", "so")], [Perplexity()])
