"""Templates, token by token: what is pooled, what is cut, what is refused."""

from __future__ import annotations

import pytest
from promptmodels import encoder, wordpiece

from residency import bases
from residency.embedded import base_folder
from residency.errors import DataError, PlanError
from residency.labeltemplates import Prompter


@pytest.fixture(name="wordpiece", scope="module")
def _wordpiece():
    return wordpiece()


@pytest.fixture(name="encoder", scope="module")
def _encoder():
    return encoder()


def pooled(prompter, tokenizer, text, label=""):
    marked = prompter(text, label)
    return [tokenizer.decode([i]) for i, own in zip(marked.ids, marked.pool, strict=True) if own], marked


def test_only_the_sentence_is_pooled(wordpiece):
    prompter = Prompter(wordpiece, "about {label} : {text} {sep} in terms of {label}")
    words, marked = pooled(prompter, wordpiece, "The soup, unluckyly , wasn't good.", "soup")
    assert words == ["the", "soup", ",", "un", "##lucky", "##ly", ",", "wasn", "'", "t", "good", "."]
    assert wordpiece.decode(marked.ids).count("[SEP]") == 2
    words, _ = pooled(Prompter(wordpiece, "{text} is {mask}", "mask"), wordpiece, "the [MASK] soup", "x")
    assert words == ["[MASK]"]
    words, marked = pooled(Prompter(wordpiece), wordpiece, "the soup")
    assert words == ["the", "soup"]
    assert marked.ids == tuple(wordpiece("the soup")["input_ids"])
    _, marked = pooled(Prompter(wordpiece), wordpiece, "\u200b")  # a text without tokens
    assert all(marked.pool)
    assert len(marked) == 2


def test_long_sentences_are_cut_and_the_template_is_not(wordpiece):
    text = "unluckyly the soup " * 30
    for room in range(12, 40, 3):
        words, marked = pooled(
            Prompter(wordpiece, "{text} {sep} about {label} .", max_tokens=room), wordpiece, text, "staff"
        )
        assert room - 2 <= len(marked) <= room
        assert wordpiece.decode(marked.ids).endswith("[SEP] about staff . [SEP]")
        assert "staff" not in words
    with pytest.raises(DataError, match="leaves no room"):
        Prompter(wordpiece, "{text} about {label}", max_tokens=6)(text, "wall lamp sofa price")
    byte = bases.load_tokenizer(base_folder("tiny-text-encoder"))
    marked = Prompter(byte, "{text}|{label}", max_tokens=20)("äöü" * 20, "é")
    assert len(marked) <= 20
    assert sum(marked.pool) >= 15


@pytest.mark.parametrize(
    ("template", "pool", "says"),
    [
        ("{label}", "sentence", "must hold {text} once"),
        ("{text} {text}", "sentence", "must hold {text} once"),
        ("{text} {lable}", "sentence", "has {lable}"),
        ("{text} {", "sentence", "cannot be read"),
        ("{text!r:>9}", "sentence", "must hold {text} once"),
        ("{text} {label}", "mask", "needs {mask} once"),
    ],
)
def test_templates_that_cannot_work_are_refused(wordpiece, template, pool, says):
    with pytest.raises(PlanError, match=says):
        Prompter(wordpiece, template, pool)


def test_a_tokenizer_without_a_mask_is_named():
    byte = bases.load_tokenizer(base_folder("tiny-text-encoder"))
    with pytest.raises(PlanError, match="no mask token"):
        Prompter(byte, "{text} {mask}", "mask")
