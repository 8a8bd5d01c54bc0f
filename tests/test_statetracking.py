"""The tracker: its loss against plain sums, its decoding against all pairs, and what span replacement is for."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, BertModel, PreTrainedTokenizerFast

from residency import dialoguestate as states
from residency import statetracking as dst
from residency.curate.spans import SpanReplace
from residency.objective import IGNORE, Outputs
from residency.train import fit
from residency.trainparams import TrainParams

SLOTS = ["food", "area"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = "i a ? . , what want would like food please some place with kind of the north thai greek swiss"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Known words, and letters for the others."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *dict.fromkeys([*WORDS.split(), *LETTERS]),
        *(f"##{x}" for x in LETTERS),
    ]
    inner = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def row(text: str, *labels: tuple[str, str], **more: Any) -> dict[str, Any]:
    """A row whose spans are the last places of the given (slot, surface)."""
    spans = [{"slot": s, "start": text.rindex(v), "end": text.rindex(v) + len(v)} for s, v in labels]
    return {"text": text, "spans": spans, **more}


def bert(vocabulary: int, seed: int = 0) -> BertModel:
    """A tiny random encoder without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,
        )
        return BertModel(config, add_pooling_layer=False)


def small(tokenizer: Any, slots: list[str] = SLOTS, seed: int = 0) -> dst.Tracker:
    """A tiny tracker without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dst.Tracker(bert(len(tokenizer), seed), 16, slots, dropout=0.0)


ROWS = [
    row("what kind of food? [SEP] Thai food, please", ("food", "Thai")),
    row("[SEP] the north, zürich food", ("area", "north"), ("food", "zürich")),
    row("thai or greek? [SEP] i would like some", dontcare=["area"]),
    row("a place with swiss food. [SEP] .", ("food", "swiss")),
    row("[SEP] what", dontcare=["food", "area"]),
]


def turns(tokenizer: Any, rows: Any = ROWS, slots: list[str] = SLOTS) -> list[dst.Turn]:
    """Rows as turns."""
    return [dst.encode(r, tokenizer, slots) for r in rows]


# ------------------------------------------------------------------ rows to tensors


def test_spans_are_found_in_tokens(tokenizer: Any) -> None:
    for r, turn in zip(ROWS, turns(tokenizer), strict=True):
        for span in r["spans"]:
            i = SLOTS.index(span["slot"])
            said = tokenizer.decode(turn.tokens[turn.starts[i] : turn.ends[i] + 1])
            assert said.replace(" ", "") == {"zürich": "zurich"}.get(
                x := r["text"][span["start"] : span["end"]].lower(), x
            )
            assert turn.classes[i] == dst.COPY
    first = turns(tokenizer)[0]
    assert first.classes == (dst.COPY, dst.NONE)
    assert first.starts[1] == IGNORE
    marks = [t for t, token in enumerate(first.tokens) if token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    assert [t for t, part in enumerate(first.part) if part < 0] == marks
    assert sorted(set(first.part)) == [-1, 0, 1]
    assert turns(tokenizer)[2].classes == (dst.NONE, dst.DONTCARE)


def test_the_last_of_two_spans_of_a_slot_counts(tokenizer: Any) -> None:
    both = {"text": "thai greek", "spans": [{"slot": "food", "start": a, "end": b} for a, b in ((5, 10), (0, 4))]}
    assert dst.encode(both, tokenizer, SLOTS).starts[0] == 2


def test_rows_that_cannot_be_encoded(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="whole tokens"):
        dst.encode(row("some thai food", ("food", "hai")), tokenizer, SLOTS)
    with pytest.raises(ValueError, match="at most 4"):
        dst.encode(row("some thai food"), tokenizer, SLOTS, max_tokens=4)


def test_slot_value_dropout_takes_the_value_and_nothing_else(tokenizer: Any) -> None:
    many = turns(tokenizer) * 200
    plain = dst.collate(many, 0)
    state = torch.get_rng_state()
    some = dst.collate(many, 0, unknown=1, dropout=0.3)
    torch.set_rng_state(state)
    assert torch.equal(some["input_ids"], dst.collate(many, 0, unknown=1, dropout=0.3)["input_ids"])
    place = torch.arange(plain["part"].shape[1])
    inside = ((plain["starts"][..., None] <= place) & (place <= plain["ends"][..., None])).any(1)
    changed = some["input_ids"] != plain["input_ids"]
    assert not (changed & ~inside).any()
    assert abs(changed[inside].double().mean() - 0.3) < 4 * (0.21 / int(inside.sum())) ** 0.5
    assert (some["input_ids"][changed] == 1).all()
    every = dst.collate(many, 0, unknown=1, dropout=1.0)
    assert torch.equal(every["input_ids"] == 1, inside)
    assert all(torch.equal(some[key], plain[key]) for key in plain if key != "input_ids")
    with pytest.raises(ValueError, match="unknown"):
        dst.collate(many, 0, dropout=0.3)


# ------------------------------------------------------------------ model and loss


def test_span_scores_are_those_of_a_question_answering_head(tokenizer: Any) -> None:
    model = small(tokenizer, ["food"]).eval()
    peer = BertForQuestionAnswering(bert(len(tokenizer)).config).eval()
    peer.bert.load_state_dict(model.encoder.state_dict())
    peer.qa_outputs.load_state_dict(model.spans.state_dict())
    batch = dst.collate(turns(tokenizer, slots=["food", "area"]), 0)
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected, (_, starts, ends) = peer(**given), model(**given).split()
    there = batch["attention_mask"].bool()
    torch.testing.assert_close(starts[:, 0][there], expected.start_logits[there])
    torch.testing.assert_close(ends[:, 0][there], expected.end_logits[there])
    assert (starts[:, 0][~there] < -1e30).all()


def by_hand(logits: torch.Tensor, batch: dict[str, Any], share: float) -> float:
    """The loss by loops."""
    width, total = batch["input_ids"].shape[1], 0.0

    def nll(scores: list[float], target: int) -> float:
        most = max(scores)
        return most + math.log(sum(math.exp(s - most) for s in scores)) - scores[target]

    for b, slots in enumerate(logits.tolist()):
        for s, scores in enumerate(slots):
            total += share * nll(scores[:3], int(batch["labels"][b, s]))
            if int(batch["labels"][b, s]) == dst.COPY:
                start = nll(scores[3 : 3 + width], int(batch["starts"][b, s]))
                total += (1 - share) * 0.5 * (start + nll(scores[3 + width :], int(batch["ends"][b, s])))
    return total


@pytest.mark.parametrize("share", [0.8, 0.0, 1.0])
def test_the_loss_is_the_sum_over_rows_and_slots(tokenizer: Any, share: float) -> None:
    batch = dst.collate(turns(tokenizer), 0)
    logits = small(tokenizer)(batch["input_ids"], batch["attention_mask"]).logits
    total, count = dst.TrackingLoss(share)(Outputs(logits=logits), batch)
    assert int(count) == dst.TrackingLoss().count(batch) == 5
    assert abs(float(total.detach()) - by_hand(logits, batch, share)) < 1e-3
    total.backward()


def test_parts_of_a_batch_add_up_whatever_the_padding(tokenizer: Any) -> None:
    model, loss = small(tokenizer), dst.TrackingLoss()
    found = []
    for cut in ((0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)):
        model.zero_grad()
        for a, b in pairwise(cut):
            batch = dst.collate(turns(tokenizer)[a:b], 0)
            loss(Outputs(logits=model(batch["input_ids"], batch["attention_mask"]).logits), batch)[0].backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for parts in found[1:]:
        for one, other in zip(found[0], parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(g).all() for g in found[0])


def test_half_precision_gives_scores_in_float32(tokenizer: Any) -> None:
    model = small(tokenizer).to(torch.bfloat16)
    batch = dst.collate(turns(tokenizer), 0)
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    assert logits.dtype == torch.float32
    total, _ = dst.TrackingLoss()(Outputs(logits=logits), batch)
    total.backward()
    assert torch.isfinite(total)


def test_a_share_outside_of_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="class_share"):
        dst.TrackingLoss(1.5)


# ------------------------------------------------------------------ decoding


@pytest.mark.parametrize("longest", [None, 1, 2])
def test_the_best_span_is_the_best_of_all_pairs(longest: int | None) -> None:
    torch.manual_seed(0)
    part = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 1, -1], [-1, 0, -1, 1, 1, -1, -1, -1, -1], [-1] * 9])
    for _ in range(30):
        scores = dst.Scores(torch.randn(3, 2, 3 + 18))
        classes, starts, ends = dst.decode(scores, part, longest)
        for b in range(3):
            for s in range(2):
                flat = scores.logits[b, s].tolist()
                assert flat[:3][int(classes[b, s])] == max(flat[:3])
                pairs = [
                    (flat[3 + i] + flat[12 + j], i, j)
                    for i in range(9)
                    for j in range(i, min(9, i + (longest or 9)))
                    if part[b, i] == part[b, j] != -1
                ]
                expected = max(pairs)[1:] if pairs else (-1, -1)
                assert (int(starts[b, s]), int(ends[b, s])) == expected


class Fixed(nn.Module):
    """An encoder whose states are one-hot ids."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(input_ids, 100).float())


def test_predictions_are_the_text_of_the_span(tokenizer: Any) -> None:
    model = dst.Tracker(Fixed(), 100, ["food"]).train()
    for head in (model.classes, model.spans):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    with torch.no_grad():
        model.classes.bias[dst.COPY] = 1
        model.spans.weight[:, tokenizer.convert_tokens_to_ids("thai")] = 1
        model.spans.weight[1, tokenizer.convert_tokens_to_ids("food")] = 2
    said = dst.predict(model, turns(tokenizer, slots=["food", "area"]), 0, batch=2)
    assert said[0] == {"food": "thai food"}
    assert said[2]["food"] == "thai"
    assert model.training
    with torch.no_grad():
        model.classes.bias[dst.DONTCARE] = 2
    assert dst.predict(model, turns(tokenizer), 0) == [{"food": "dontcare"}] * 5
    with torch.no_grad():
        model.classes.bias[dst.NONE] = 3
    assert dst.predict(model, turns(tokenizer), 0) == [{}] * 5
    assert dst.predict(model, [], 0) == []


def test_a_prediction_does_not_depend_on_its_batch(tokenizer: Any) -> None:
    model = small(tokenizer, seed=3)
    with torch.no_grad():
        model.classes.bias.view(2, 3)[:, dst.COPY] = 10
    alone = [dst.predict(model, [turn], 0)[0] for turn in turns(tokenizer)]
    assert dst.predict(model, turns(tokenizer), 0, batch=3) == alone
    assert len({str(state) for state in alone}) > 2


# ------------------------------------------------------------------ states and metrics


def test_a_turn_overwrites_what_it_speaks_of() -> None:
    said = [{"food": "thai"}, {}, {"area": "north", "food": "greek"}, {"food": "dontcare"}, {"area": "south"}]
    found = states.accumulate(["a", "a", "a", "b", "b"], said)
    assert found[:3] == [{"food": "thai"}, {"food": "thai"}, {"food": "greek", "area": "north"}]
    assert found[3:] == [{"food": "dontcare"}, {"food": "dontcare", "area": "south"}]
    assert states.accumulate([], []) == []


def test_values_are_compared_as_text() -> None:
    gold: list[states.State] = [{"food": "asian oriental"}, {"food": "dontcare"}, {}, {"food": "thai", "area": "north"}]
    said: list[states.State] = [{"food": "Asian  Oriental"}, {}, {"food": "thai"}, {"food": "thai", "area": "south"}]
    assert states.joint(said, gold) == 0.25
    assert states.joint(said, gold, [0]) == 1
    assert states.joint(gold, gold) == 1
    assert math.isnan(states.joint(said, gold, []))
    assert states.per_class(said, gold, SLOTS) == {"none": 3 / 4, "dontcare": 0.0, "copy": 2 / 3}
    assert math.isnan(states.per_class([{}], [{}], SLOTS)["copy"])


# ------------------------------------------------------------------ what it is for


class Reader(nn.Module):
    """Embeddings and a bidirectional GRU; [CLS] sees the maximum."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        self.gru = nn.GRU(32, 32, batch_first=True, bidirectional=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden, _ = self.gru(self.embedding(input_ids))
        return SimpleNamespace(last_hidden_state=torch.cat([hidden.amax(1, keepdim=True), hidden[:, 1:]], 1))


def trained(tokenizer: Any, rows: Any, scratch: Path, steps: int = 100) -> dst.Tracker:
    """A small tracker of one slot, trained by the project's loop."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = dst.Tracker(Reader(len(tokenizer)), 64, ["food"], dropout=0.0)
    params = TrainParams(max_steps=steps, batch=16, learning_rate=5e-3, precision="float32", checkpoint_seconds=1e6)
    items = turns(tokenizer, rows, ["food"])
    log = fit(model, dst.TrackingLoss(), items, params, pad=0, scratch=scratch, collator=partial(dst.collate, pad=0))
    assert log.loss[-1] < 0.2 * log.loss[0]
    return model


def test_replaced_values_teach_to_copy_what_was_never_seen(tokenizer: Any, tmp_path: Path) -> None:
    frames = ["i want {} food please", "some {} food", "i would like a place with {} food ."]
    silent = [
        row("i want a place please"),
        row("[SEP] the north ."),
        row("some food please"),
        row("what kind of food ?"),
    ]
    known = [row(f.format(v), ("food", v)) for f in frames for v in ("thai", "greek", "swiss")]
    new = ["wqzpf", "basque", "icelandic", "mexican", "peruvian", "tuscan"]
    test = [row(f.format(v), ("food", v)) for f in frames for v in new]
    gold: list[states.State] = [{"food": v} for _ in frames for v in new]
    plain = trained(tokenizer, known + silent, tmp_path / "plain")
    exam = turns(tokenizer, test, ["food"])
    before = states.joint(dst.predict(plain, exam, 0), gold)
    rows = SpanReplace(copies=20).augment(known + silent, generate=_letters).rows
    after = states.joint(dst.predict(trained(tokenizer, rows, tmp_path / "new"), exam, 0), gold)
    seen = dst.predict(plain, turns(tokenizer, known, ["food"]), 0)
    assert states.joint(seen, [{"food": v} for _ in frames for v in ("thai", "greek", "swiss")]) == 1
    assert after >= before + 0.4, f"unseen values: {before:.2f} without, {after:.2f} with replaced values"


def _letters(rng: Any, _: str) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(5, 9)))
