"""What stands beside a checkpoint is found by chat and examination: drafts, budgets, both."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch

from residency import bases, decoding, embedded, store
from residency.chat import Chat
from residency.errors import DataError
from residency.evaluate.cost import measure_speed
from residency.infer import saveddraft
from residency.infer.drafted import Drafted
from residency.infer.tree import DynamicTree

LONG = "\n\n".join(f"Paragraph {i} says that permit {i} costs {7 * i} crowns." for i in range(30))


@pytest.fixture
def folder(tmp_path):
    store.link_folder(embedded.base_folder("tiny-llama"), tmp_path / "model")
    return tmp_path / "model"


def add_draft(folder):
    model = bases.load_causal_lm(folder)
    torch.manual_seed(0)
    drafter = saveddraft.make("clover-2", model, {"heads": 2, "layers": 1}, None).attach(model)
    saveddraft.save(folder, drafter, "clover-2", {"heads": 2, "layers": 1}, DynamicTree(4))


def add_budget(folder, budget=48):
    (folder / "cache.json").write_text(json.dumps({"method": "citrus", "budget": budget, "chunk": 16}))


def answer(folder, question):
    chat = Chat.open(folder, max_tokens=12)
    return "".join(chat.ask(question)), chat


def test_an_ordinary_checkpoint_needs_nothing(folder):
    model = bases.load_causal_lm(folder)
    before = dict(model.lm_head.__dict__)
    with decoding.prepared(folder, model) as options:
        assert options == {}
    assert model.lm_head.__dict__.keys() == before.keys()
    assert not decoding.has_draft(folder)
    assert not decoding.has_budget(folder)


def test_a_draft_changes_no_answer(folder):
    plain, _ = answer(folder, "What is a permit?")
    add_draft(folder)
    drafted, chat = answer(folder, "What is a permit?")
    assert drafted == plain
    assert isinstance(chat.options["custom_generate"], Drafted)
    assert chat.options["custom_generate"].stats.steps
    assert measure_speed(chat.model, [5, 6, 7], 4, 1, **chat.options).time_to_first_token_ms > 0
    "".join(chat.ask("And then?"))  # a second turn
    assert len(chat.turns) == 4


def test_a_budget_is_kept_in_a_chat(folder):
    whole, _ = answer(folder, f"{LONG}\n\nWhat does permit 3 cost?")
    add_budget(folder, budget=8000)
    assert answer(folder, f"{LONG}\n\nWhat does permit 3 cost?")[0] == whole  # budget of everything
    (folder / "cache.json").unlink()
    add_budget(folder)
    _, chat = answer(folder, f"{LONG}\n\nWhat does permit 3 cost?")
    assert chat.budget
    ids = chat.tokenizer(LONG, return_tensors="pt")["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = chat.model.generate(
        ids, instruction_tokens=9, return_dict_in_generate=True, pad_token_id=0, **settings, **chat.options
    )
    assert ids.shape[1] > 500
    assert all(layer.keys.shape[-2] <= 48 + 9 + 4 for layer in out.past_key_values.layers)


def test_the_question_is_the_last_paragraph(folder):
    add_budget(folder)
    chat = Chat.open(folder, max_tokens=2)
    given = {}
    original = chat.model.generate
    chat.model.generate = lambda **k: given.update(k) or original(**k)
    "".join(chat.ask(f"{LONG}\n\nWhat does permit 3 cost?"))
    tail = chat.tokenizer.decode(given["input_ids"][0, -given["instruction_tokens"] :])
    assert tail.startswith("What does permit 3 cost?")


def test_short_prompts_are_drafted_for_and_long_ones_evicted_from(folder):
    plain, _ = answer(folder, "Hi")
    add_draft(folder)
    add_budget(folder)
    both, chat = answer(folder, "Hi")
    way = chat.options["custom_generate"]
    assert isinstance(way, decoding.ByLength)
    assert both == plain
    steps = way.short.stats.steps
    assert steps
    "".join(chat.ask(LONG))
    assert way.short.stats.steps == steps


def test_damage_is_said(folder):
    add_draft(folder)
    (folder / "draft" / "config.json").write_text("{")
    with pytest.raises(DataError, match="draft cannot be read"):
        Chat.open(folder)
    shutil.rmtree(folder / "draft")
    (folder / "cache.json").write_text('{"method": "forget-all"}')
    with pytest.raises(DataError, match="cache settings do not fit"):
        Chat.open(folder)


@pytest.mark.parametrize("drafted", [False, True])
def test_an_answer_may_be_left_before_its_end(folder, drafted):
    if drafted:
        add_draft(folder)
    chat = Chat.open(folder, max_tokens=300)
    answer = chat.ask("What is a permit?")
    next(answer)
    answer.close()
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    assert threading.active_count() == 1 or not any("generate" in t.name for t in threading.enumerate())
    chat.max_tokens = 5
    "".join(chat.ask("And then?"))
    assert len(chat.turns) == 4


def test_a_question_that_fails_leaves_no_trace(folder):
    chat = Chat.open(folder, max_tokens=4)
    chat.options["no_such_argument"] = 1
    with pytest.raises(ValueError, match="no_such_argument"):
        "".join(chat.ask("Hi"))
    assert chat.turns == []
