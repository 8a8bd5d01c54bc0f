"""Two tokenizers over one answer: which tokens are paired, and what the objective sums over them."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from residency import rows
from residency.compress import crossvocabulary
from residency.compress.crossvocabulary import CrossVocabulary
from residency.compress.uld import ULD
from residency.errors import DataError
from residency.objective import Head, Outputs


def tokenizer(merges=(), template=None):
    vocabulary = {t: i for i, t in enumerate(["<e>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<e>", pad_token="<e>")
    made.chat_template = template
    return made


def model(size, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def read(*answers):
    return rows.read([{"id": f"r{i}", "prompt": f"Q{i}:", "completion": a} for i, a in enumerate(answers)]).rows


def test_pairs_are_where_both_have_read_the_same_text():
    plain, merged = tokenizer(), tokenizer([("t", "h"), ("th", "e")])
    item = crossvocabulary.encode(read("the moth")[0], merged, plain)
    # the|Ġ|m|o|th|<e>  and  t|h|e|Ġ|m|o|t|h|<e>
    assert item.pairs == ((0, 0), (1, 3), (2, 4), (3, 5), (4, 6), (5, 8))


def test_characters_of_several_bytes_are_no_meeting_place():
    plain, merged = tokenizer(), tokenizer([("Ã", "©")])  # é
    item = crossvocabulary.encode(read("né!")[0], merged, plain)
    assert item.pairs == ((0, 0), (1, 1), (2, 3), (3, 4))


def test_with_one_tokenizer_the_objective_is_the_loss_over_all_answer_tokens():
    same, student, teacher = tokenizer(), model(258), model(258, 1)
    items, refused = crossvocabulary.encode_all(read("abc", "hello there", "x"), same, same, 60)
    assert not refused
    batch = crossvocabulary.collate(items, 0, 0)
    hidden = student(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    objective = CrossVocabulary(ULD(), teacher, label_weight=1.0)
    total, count = objective(Outputs(hidden=hidden.hidden_states[-1], head=Head(student.lm_head.weight)), batch)
    expected, n = 0.0, 0
    for item in items:
        ids = torch.tensor([item.student.prompt + item.student.answer])
        at = slice(len(item.student.prompt) - 1, -1)
        p, q = (m(ids).logits[0, at].softmax(-1) for m in (student, teacher))
        expected += float((p.sort(descending=True).values - q.sort(descending=True).values).abs().sum())
        expected -= float(p.log().gather(1, torch.tensor(item.student.answer)[:, None]).sum())
        n += len(item.student.answer)
    assert int(count) == n == objective.count(batch)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-4)
    total.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_rows_that_cannot_be_aligned_or_are_too_long_are_refused_with_the_reason():
    shouting = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content | upper }}{% else %}{{ m.content }}:"
    shouting += "{% endif %}{% endfor %}"
    chat = rows.read([{"id": "a", "instruction": "Q", "output": "small"}]).rows
    with pytest.raises(DataError, match="changes the answer"):
        crossvocabulary.encode(chat[0], tokenizer(template=shouting), tokenizer())
    kept, refused = crossvocabulary.encode_all(read("short", "long " * 30), tokenizer(), tokenizer(), 40)
    assert [item.id for item in kept] == ["r0"]
    assert "too long" in refused[0].reason


def test_the_templates_own_text_is_not_taken_for_the_answer():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}assistant>{{ m.content }}</a>{% else %}{{ m.content }}"
    )
    template += ":{% endif %}{% endfor %}"
    row = rows.read([{"id": "a", "instruction": "Q", "output": "a"}]).rows[0]
    item = crossvocabulary.encode(row, tokenizer(template=template), tokenizer(template=template))
    answer = "assistant>a</a>"
    assert len(item.student.answer) == len(answer)
    assert [i for i, _ in item.pairs][-1] >= answer.index(">a") + 1


def test_half_precision_teacher_and_no_meeting_place():
    same, student = tokenizer(), model(258)
    batch = crossvocabulary.collate(crossvocabulary.encode_all(read("ab"), same, same, 60)[0], 0, 0)
    batch["pairs"] = batch["pairs"][:0]
    hidden = student(batch["input_ids"], output_hidden_states=True).hidden_states[-1]
    objective = CrossVocabulary(ULD(), model(258, 1).to(torch.bfloat16))
    total, count = objective(Outputs(hidden=hidden, head=Head(student.lm_head.weight)), batch)
    assert float(total.detach()) == 0.0
    assert int(count) == 3  # a, b and the end; only labels could teach them
