"""ROUGE-L against Google's rouge_score; the bit-parallel LCS against the textbook recurrence."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.errors import DataError
from residency.evaluate.rouge_l import RougeL, lcs_length, rouge_l, unicode_words, words

scorer = pytest.importorskip("rouge_score.rouge_scorer")


def textbook(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.lists(st.integers(0, 4), max_size=25), st.lists(st.integers(0, 4), max_size=25))
@settings(max_examples=300, deadline=None)
def test_lcs_is_the_textbooks(a, b):
    assert lcs_length(a, b) == lcs_length(b, a) == textbook(a, b)


@pytest.mark.parametrize("size", [63, 64, 65, 200])
def test_lcs_across_word_boundaries(size):
    a = [(i * i) % 7 for i in range(size)]
    b = [(i * 3) % 5 for i in range(size + 3)]
    assert lcs_length(a, b) == textbook(a, b)
    assert lcs_length(a, a) == size


sentences = st.lists(st.sampled_from(["the", "wall", "Roof,", "is", "2", "high.", "año", "don't"]), max_size=12).map(
    " ".join
)


@given(sentences, sentences)
@settings(max_examples=150, deadline=None)
def test_equals_rouge_score(said, target):
    theirs = scorer.RougeScorer(["rougeL"], use_stemmer=False).score(target, said)["rougeL"].fmeasure
    assert rouge_l(words(said), words(target)) == pytest.approx(theirs, abs=1e-12)


def test_several_references_and_the_mean_equal_rouge_score():
    data = [
        ("the wall is two metres high", ["a wall of two metres", "the roof is high"]),
        ("", ["nothing was said"]),
        ("permit permit permit", ["the permit"]),
    ]
    theirs = scorer.RougeScorer(["rougeL"])
    metric = RougeL()
    for i, (said, targets) in enumerate(data):
        metric.update(str(i), said, targets)
    expected = [theirs.score_multi(targets, said)["rougeL"].fmeasure for said, targets in data]
    score = metric.compute()
    assert [item.score for item in score.items] == pytest.approx(expected)
    assert score.value == pytest.approx(sum(expected) / 3)


def test_unicode_words_equal_rouge_score_with_that_tokenizer():
    class Tokenizer:
        def tokenize(self, text):
            return unicode_words(text)

    said, target = "El año próximo, la pared (größer)", "la pared será größer el año próximo"
    theirs = scorer.RougeScorer(["rougeL"], tokenizer=Tokenizer()).score(target, said)["rougeL"].fmeasure
    metric = RougeL(unicode_words)
    metric.update("a", said, target)
    assert metric.compute().value == pytest.approx(theirs)
    assert unicode_words("AÑO_2 日本 x") == ["año", "2", "日本", "x"]


def test_a_reference_without_tokens_is_refused_not_scored_zero():
    with pytest.raises(DataError, match="unicode_words"):
        RougeL().update("a", "日本", "日本")
    metric = RougeL(unicode_words)
    metric.update("a", "日本", "日本")
    assert metric.compute().value == 1.0


def test_long_texts_are_fast():
    a = [i % 97 for i in range(4000)]
    b = [(i * 7) % 89 for i in range(4000)]
    begin = time.process_time()
    lcs_length(a, b)
    assert time.process_time() - begin < 1.0  # the textbook takes about ten seconds
