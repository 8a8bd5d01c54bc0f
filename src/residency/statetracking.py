"""A dialogue state tracker that copies: for each slot none, "I do not care", or a span of the text.

An encoder gives a state per token, h [B, T, D]. For each of S slots, with linear heads and nothing between:

    class scores  z = W_c h_[CLS] + b_c     [3]        none | dontcare | copy
    span scores   a_t, b_t = W_s h_t + b_s  [T] each   start and end

    ℓ = 0.8 CE(z, class) + 0.2 · ½ (CE(a, start) + CE(b, end)) · 1[class = copy]       summed over slots and rows

Prediction: the class with the highest score; for copy, the pair i ≤ j with the highest a_i + b_j whose tokens lie in
one part of the text, so never across a [SEP], on it, or on padding. The value is the text between the characters where
the two tokens begin and end. The state of a dialogue starts empty, and what a turn says that is not none overwrites it.

BERT-DST's own remedy against learning values by heart, slot value dropout, is in `collate`: each word piece of a
labelled value becomes [UNK] with a given probability. (It also takes from the model the evidence that it is to copy.)

Paper: Chao & Lane, "BERT-DST: Scalable End-to-End Dialogue State Tracking with Bidirectional Encoder Representations
from Transformer", Interspeech 2019, arXiv 1907.03040. Official code: guanlinchao/bert-dst (TensorFlow 1, no licence;
read for facts, never copied). Different here: [CLS] is read without BERT's pooler; padding takes no part in the span
softmax; the loss is divided by the rows of an optimiser step and not left as a sum; ends cannot precede starts, and
spans cannot cross parts (there each argmax stands alone); what is compared is the value's text, not its place.

Rows are those of `residency.curate.spans`: {text, spans: [{slot, start, end, value?}], dontcare?: [slots]}, where the
text has the context first and the tokenizer's separator before what the user says. Cost: one pass of the encoder, and
B S T² numbers to decode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residency.dialoguestate import CLASSES, State
from residency.objective import IGNORE, Objective, Outputs

NONE, DONTCARE, COPY = range(len(CLASSES))


@dataclass(frozen=True)
class Turn:
    """One row as token ids and labels.

    Args:
        tokens: Ids, special tokens included.
        part: For every token, the number of its part of the text; −1 on special tokens.
        offsets: For every token, where its characters begin and end.
        text: What the offsets are of.
        classes, starts, ends: For each slot; places are `IGNORE` where nothing is copied.
    """

    tokens: tuple[int, ...]
    part: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    text: str
    classes: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def encode(row: Mapping[str, Any], tokenizer: Any, slots: Sequence[str], max_tokens: int = 180) -> Turn:
    """Tokenise a row and find the tokens of its spans; of several spans of a slot the last counts.

    Raises:
        ValueError: When the text is too long, or a span is not made of whole tokens.
    """
    given = tokenizer(row["text"], return_offsets_mapping=True)
    ids, offsets = given["input_ids"], given["offset_mapping"]
    if len(ids) > max_tokens:
        raise ValueError(f"{len(ids)} tokens, at most {max_tokens}: shorten the context of {row['text'][:60]!r}")
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
    part, number = [], 0
    for token in ids:
        number += token == tokenizer.sep_token_id
        part.append(-1 if token in special else number)
    classes, starts, ends = ([value] * len(slots) for value in (NONE, IGNORE, IGNORE))
    for slot in row.get("dontcare", ()):
        classes[slots.index(slot)] = DONTCARE
    for span in sorted(row["spans"], key=lambda span: span["start"]):
        if span["slot"] not in slots:
            continue
        i = slots.index(span["slot"])
        first = [t for t, (a, b) in enumerate(offsets) if part[t] >= 0 and a == span["start"] and b > a]
        last = [t for t, (a, b) in enumerate(offsets) if part[t] >= 0 and b == span["end"] and b > a]
        if not first or not last:
            raise ValueError(f"the span {span} is not made of whole tokens of {row['text']!r}")
        classes[i], starts[i], ends[i] = COPY, first[0], last[-1]
    return Turn(
        tuple(ids), tuple(part), tuple(map(tuple, offsets)), row["text"], tuple(classes), tuple(starts), tuple(ends)
    )


def collate(turns: Sequence[Turn], pad: int, unknown: int | None = None, dropout: float = 0.0) -> dict[str, Tensor]:
    """Right-padded tensors; `labels` are the classes [B, S], `starts` and `ends` [B, S], `part` [B, T].

    Args:
        turns: B of them.
        pad: Id of the padding.
        unknown: Id of [UNK]; needed for dropout.
        dropout: Chance of each token of a labelled value to become [UNK] (from torch's global random numbers, which
            the training loop seeds).

    Raises:
        ValueError: When dropout is asked for without `unknown`.
    """
    if dropout and unknown is None:
        raise ValueError("slot value dropout needs the id of the unknown token")
    width = max(len(turn) for turn in turns)
    ids, part = torch.full((len(turns), width), pad), torch.full((len(turns), width), -1)
    mask = torch.zeros((len(turns), width), dtype=torch.long)
    for b, turn in enumerate(turns):
        ids[b, : len(turn)] = torch.tensor(turn.tokens)
        part[b, : len(turn)] = torch.tensor(turn.part)
        mask[b, : len(turn)] = 1
        for start, end in zip(turn.starts, turn.ends, strict=True):
            if dropout and unknown is not None and start != IGNORE:
                value = ids[b, start : end + 1]
                value[torch.rand(len(value)) < dropout] = unknown
    labels, starts, ends = (
        torch.tensor([getattr(turn, name) for turn in turns]) for name in ("classes", "starts", "ends")
    )
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "part": part,
        "labels": labels,
        "starts": starts,
        "ends": ends,
    }


@dataclass
class Scores:
    """Scores [B, S, 3 + 2 T]: of the classes, of every token as start, of every token as end."""

    logits: Tensor

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Classes [B, S, 3], starts [B, S, T], ends [B, S, T]."""
        width = (self.logits.shape[-1] - len(CLASSES)) // 2
        classes, starts, ends = self.logits.split((len(CLASSES), width, width), -1)
        return classes, starts, ends


class Tracker(nn.Module):
    """An encoder and, for each slot, a class head and a span head.

    Args:
        encoder: Called with `input_ids` and `attention_mask`, answers with `last_hidden_state` [B, T, width].
        width: D.
        slots: Their names.
        dropout: Before the heads.
    """

    def __init__(self, encoder: nn.Module, width: int, slots: Sequence[str], dropout: float = 0.3) -> None:
        super().__init__()
        self.encoder, self.slots = encoder, list(slots)
        self.dropout = nn.Dropout(dropout)
        self.classes = nn.Linear(width, len(slots) * len(CLASSES))
        self.spans = nn.Linear(width, len(slots) * 2)

    def get_output_embeddings(self) -> None:
        """None: there is no language-model head (the training loop asks)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Scores:
        """Ids and mask [B, T] → `Scores`; padding has the lowest score as start and end."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        hidden = self.dropout(hidden)
        rows, width = input_ids.shape
        classes = self.classes(hidden[:, 0]).view(rows, -1, len(CLASSES)).float()
        spans = self.spans(hidden).view(rows, width, -1, 2).permute(3, 0, 2, 1).float()
        spans = spans.masked_fill(~attention_mask.bool()[None, :, None], torch.finfo(spans.dtype).min)
        return Scores(torch.cat([classes, spans[0], spans[1]], -1))


class TrackingLoss(Objective):
    """Classes and spans, as in the module; the count is the rows of a batch.

    Args:
        class_share: Of the class loss; the rest is the span loss.
    """

    wants = "logits"
    per_row = True

    def __init__(self, class_share: float = 0.8) -> None:
        super().__init__()
        if not 0 <= class_share <= 1:
            raise ValueError(f"class_share {class_share}: it must be within 0…1")
        self.class_share = class_share

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, rows)."""
        assert outputs.logits is not None
        classes, starts, ends = Scores(outputs.logits).split()

        def loss(scores: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(
                scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
            )

        spans = 0.5 * (loss(starts, batch["starts"]) + loss(ends, batch["ends"]))
        total = self.class_share * loss(classes, batch["labels"]) + (1 - self.class_share) * spans
        return total, batch["labels"].new_tensor(len(batch["labels"]))


def decode(scores: Scores, part: Tensor, longest: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best class, and the best span that is one.

    Args:
        scores: Of B rows.
        part: [B, T], see `Turn`.
        longest: Most tokens of a value; None for no limit.

    Returns:
        Classes [B, S], starts and ends [B, S]; places are −1 in a row without a token to copy.
    """
    classes, starts, ends = scores.split()
    place = torch.arange(part.shape[1], device=part.device)
    distance = place[None] - place[:, None]
    legal = (distance >= 0) & (distance < (longest or len(place)))
    legal = legal & (part[:, :, None] == part[:, None]) & (part[:, :, None] >= 0)
    joint = (starts[..., :, None] + ends[..., None, :]).masked_fill(~legal[:, None], -torch.inf)
    best, found = joint.flatten(2).max(-1)
    start, end = found // len(place), found % len(place)
    return classes.argmax(-1), start.masked_fill(best == -torch.inf, -1), end.masked_fill(best == -torch.inf, -1)


@torch.no_grad()
def predict(
    model: Tracker, turns: Sequence[Turn], pad: int, batch: int = 64, longest: int | None = None
) -> list[State]:
    """What every turn says of the slots: a value in lower case or "dontcare"; slots it says nothing of are missing."""
    training, device = model.training, model.classes.weight.device
    model.eval()
    out: list[State] = [{} for _ in turns]
    order = sorted(range(len(turns)), key=lambda i: len(turns[i]))
    for low in range(0, len(turns), batch):
        chosen = order[low : low + batch]
        given = {name: tensor.to(device) for name, tensor in collate([turns[i] for i in chosen], pad).items()}
        scores = model(given["input_ids"], given["attention_mask"])
        for i, *found in zip(chosen, *(x.tolist() for x in decode(scores, given["part"], longest)), strict=True):
            for slot, kind, start, end in zip(model.slots, *found, strict=True):
                if kind == DONTCARE:
                    out[i][slot] = CLASSES[DONTCARE]
                elif kind == COPY and start >= 0:
                    out[i][slot] = turns[i].text[turns[i].offsets[start][0] : turns[i].offsets[end][1]].lower()
    model.train(training)
    return out
