"""Dialogues as ids: BERT-like and RoBERTa-like tokenizers, what is cut, and nobody's own [MASK] taken for the gap."""

from __future__ import annotations

import pytest

from residency import dialogues, embedded

TALK = (("Ann", "I got the job!"), ("Bob", "You did?"), ("Ann", "They called."), ("Bob", "I am so happy."))
WORDS = [
    *"abc!?:.,[]<>",
    *TALK[0][1].lower()[:-1].split(),
    "you",
    "did",
    "they",
    "called",
    "am",
    "so",
    "happy",
    "ann",
    "bob",
]
WORDS += ["for", "utterance", "feels", "it", "mask"]


def bert():
    from transformers import BertTokenizer

    words = [*WORDS, *(f"w{i}" for i in range(60))]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={w: i for i, w in enumerate(dict.fromkeys([*special, *words]))})


def roberta():
    from tokenizers import pre_tokenizers
    from transformers import RobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return RobertaTokenizer(vocab={w: i for i, w in enumerate([*special, *letters])}, merges=[])


@pytest.fixture(params=[bert, roberta], ids=["bert", "roberta"])
def tokenizer(request):
    return request.param()


def said(ids, tokenizer):
    return tokenizer.decode(ids).lower()


def test_the_form(tokenizer):
    ids = dialogues.render(TALK[:2], tokenizer)
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-2:] == [tokenizer.mask_token_id, tokenizer.sep_token_id]
    assert ids.count(tokenizer.mask_token_id) == 1
    assert ids.count(tokenizer.sep_token_id) == 3  # behind each turn, and at the end
    text = said(ids, tokenizer).replace(" ", "")
    for special in tokenizer.all_special_tokens:
        text = text.replace(special.lower(), "|")
    assert text.strip("|").replace("||", "|") == "ann:igotthejob!|bob:youdid?|forutterance:youdid?bobfeels"


def test_only_so_many_turns_are_shown(tokenizer):
    shown = [said(dialogues.render(TALK, tokenizer, turns=n), tokenizer) for n in range(5)]
    assert ["job" in t for t in shown] == [False, False, False, True, True]
    assert shown[3] == shown[4]
    assert all("feels" in t and "happy" in t for t in shown)


def test_the_context_loses_its_beginning_and_the_question_stays(tokenizer):
    whole = dialogues.render(TALK, tokenizer)
    asked = len(dialogues.render(TALK, tokenizer, turns=0)) - 1  # of which the context is the turn itself
    for limit in range(asked, len(whole) + 2):
        ids = dialogues.render(TALK, tokenizer, max_tokens=limit)
        assert len(ids) == min(limit, len(whole))
        assert ids[0] == tokenizer.cls_token_id
        assert ids[1:] == whole[len(whole) - len(ids) + 1 :]
        assert ids.count(tokenizer.mask_token_id) == 1


def test_a_turn_that_is_too_long_is_cut_at_its_beginning():
    tokenizer = bert()
    long = " ".join(f"w{i}" for i in range(50))
    ids = dialogues.render([("Ann", "happy"), ("Bob", long)], tokenizer, max_tokens=20)
    assert len(ids) == 20
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[:5] == ["[CLS]", "for", "utterance", ":", "w38"]
    assert words[-5:] == ["w49", "bob", "feels", "[MASK]", "[SEP]"]
    with pytest.raises(ValueError, match="no room"):
        dialogues.render(TALK, tokenizer, max_tokens=8)


def test_special_tokens_in_a_turn_are_plain_text(tokenizer):
    mask, end = tokenizer.mask_token, tokenizer.sep_token
    ids = dialogues.render([("Ann", f"a {mask} b {end} c"), (mask, f"{mask} so {end}")], tokenizer)
    assert ids.count(tokenizer.mask_token_id) == 1
    assert ids.count(tokenizer.sep_token_id) == 3
    assert ids.index(tokenizer.mask_token_id) == len(ids) - 2


def test_without_a_mask_token_the_text_ends_before_it():
    tokenizer = embedded.byte_tokenizer(None)
    assert tokenizer.decode(dialogues.render(TALK[:1], tokenizer)) == (
        "Ann: I got the job!For utterance: I got the job! Ann feels"
    )


def test_no_turn_no_speaker_and_purity(tokenizer):
    with pytest.raises(ValueError, match="at least one turn"):
        dialogues.render([], tokenizer)
    assert "it feels" in said(dialogues.render([("", "so happy")], tokenizer), tokenizer)
    before = [dialogues.render(TALK, tokenizer, 40, 2) for _ in range(2)]
    tokenizer(list("abc"), padding=True, truncation=True, max_length=2)  # a state of the tokenizer changes nothing
    assert before[0] == before[1] == dialogues.render(TALK, tokenizer, 40, 2)


@pytest.mark.embedded
def test_minilm_reads_it():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.base_folder("all-minilm-l6-v2"))
    assert tokenizer.decode(dialogues.render(TALK[-2:], tokenizer)) == (
        "[CLS] ann : they called. [SEP] bob : i am so happy. [SEP] for utterance : i am so happy. bob feels [MASK] [SEP]"
    )
