"""Rendering: prompt and answer are found exactly, whatever the template; padding and previews."""

from __future__ import annotations

import pytest
import torch

from residency import embedded, tokens
from residency.errors import DataError
from residency.objective import IGNORE
from residency.rows import Row


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.byte_tokenizer(embedded.CHAT_TEMPLATE)


CHAT = Row("a", (("system", "S"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "final ✓")))


def test_only_the_last_answer_is_trained_and_it_ends_its_turn(tokenizer):
    item = tokens.encode(CHAT, tokenizer)
    assert tokenizer.decode(item.answer) == "final ✓<|im_end|>"
    assert tokenizer.decode(item.prompt).endswith("q2<|im_end|>\n<|im_start|>assistant\n")
    whole = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in CHAT.messages], tokenize=False)
    assert tokenizer.decode(item.prompt + item.answer) == whole.rstrip("\n")


def test_plain_rows_are_concatenated_and_end_with_the_end_token(tokenizer):
    item = tokens.encode(Row("a", (("user", "Once"), ("assistant", " upon")), chat=False), tokenizer)
    assert tokenizer.decode(item.prompt + item.answer) == "Once upon<|im_end|>"
    assert item.answer[-1] == tokenizer.eos_token_id


def test_a_base_without_a_template_reads_chat_rows_too():
    plain = embedded.byte_tokenizer(None)
    item = tokens.encode(Row("a", (("user", "q"), ("assistant", "a"))), plain)
    assert plain.decode(item.prompt + item.answer) == "q\na<|im_end|>"


def test_a_template_that_does_not_continue_its_prompt_is_refused(tokenizer):
    broken = embedded.byte_tokenizer(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    with pytest.raises(DataError, match="generation prompt"):
        tokens.encode(CHAT, broken)


def test_long_rows_go_to_quarantine_uncut(tokenizer):
    kept, refused = tokens.encode_all(
        [CHAT, Row("b", (("user", "x" * 300), ("assistant", "y")), source="f.jsonl", line=7)], tokenizer, 200
    )
    assert [i.id for i in kept] == ["a"]
    assert (refused[0].source, refused[0].line) == ("f.jsonl", 7)
    assert "at most 200" in refused[0].reason


def test_collate_pads_right_and_masks(tokenizer):
    items = [tokens.Encoded("a", (5, 6), (7,)), tokens.Encoded("b", (5,), (8, 9, 10, 11))]
    batch = tokens.collate(items, pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [5, 8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 7, IGNORE, IGNORE], [IGNORE, 8, 9, 10, 11]]
    assert batch["labels"].dtype == torch.long


def test_preview_covers_all_tokens(tokenizer):
    item = tokens.encode(Row("a", (("user", "q"), ("assistant", "a"))), tokenizer)
    (shown,) = tokens.preview([item], tokenizer)
    assert sum(trained for _, trained in shown) == len(item.answer)
    assert "".join(text for text, _ in shown) == tokenizer.decode(item.prompt + item.answer)


def test_without_a_template_no_turn_is_lost():
    plain = embedded.byte_tokenizer(None)
    item = tokens.encode(CHAT, plain)
    assert plain.decode(item.prompt) == "S\nq1\na1\nq2\n"


def test_a_row_that_a_template_refuses_goes_to_quarantine(tokenizer):
    strict = embedded.byte_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + embedded.CHAT_TEMPLATE
    )
    kept, refused = tokens.encode_all([CHAT, Row("b", (("user", "q"), ("assistant", "a")))], strict, 999)
    assert [k.id for k in kept] == ["b"]
    assert "no system" in refused[0].reason
