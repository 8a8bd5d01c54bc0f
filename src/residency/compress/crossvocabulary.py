"""Distillation between models with different tokenizers: two encodings of each row, compared where they meet.

Student and teacher read the same answer cut into different tokens. After some of its tokens each has read exactly the
same text as the other after some of its own; there, and only there, both predict what comes next from the same context,
and their distributions can be compared (by a loss that does not compare word by word, such as `uld.ULD`). With
`label_weight` w > 0 the cross-entropy of the student's own answer tokens is added:

    loss sum = Σ_(i,j) ℓ(student_i, teacher_j) + w · Σ_t −log p_student(y_t)        count = number of t

The pairs (i, j) are the meeting places, t runs over all tokens of the answer: between two places only the labels teach
the student how to finish a word, so `label_weight` should not be 0 where the student's tokens are the shorter ones.

The prompts need not be the same text: each model gets its own chat template. The pairs begin at the answer.

Our choice throughout; the loss has its paper (`uld.py`), which pairs tokens by their number instead.
Cost: both models run; pairs are about as many as the answer has words. Relations: `vocabulary.py` says whether this is
needed at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from residency import tokens
from residency.compress.divergence import Divergence
from residency.compress.teacher import LiveTeacher
from residency.compress.uld import aligned_positions
from residency.errors import DataError
from residency.fusedhead import cross_entropy_sum
from residency.objective import Objective, Outputs, next_token_positions
from residency.rows import Refused, Row


@dataclass(frozen=True)
class Twice:
    """One row as both models see it.

    Args:
        id: Of the row.
        student: As the student's tokens.
        teacher: As the teacher's.
        pairs: Answer tokens (i of the student's, j of the teacher's) before which both have read the same text.
    """

    id: str
    student: tokens.Encoded
    teacher: tokens.Encoded
    pairs: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.student)

    @property
    def answer(self) -> tuple[int, ...]:
        """The student's trained tokens."""
        return self.student.answer


def encode(row: Row, student: Any, teacher: Any) -> Twice:
    """Encode one row with both tokenizers and find where they meet.

    Raises:
        DataError: When a chat template changes the answer, or a tokenizer gives no offsets.
    """
    mine, theirs = _offsets(row, student), _offsets(row, teacher)
    pairs = aligned_positions(mine, theirs, start=0)
    return Twice(row.id, tokens.encode(row, student), tokens.encode(row, teacher), tuple(pairs))


def encode_all(rows: Iterable[Row], student: Any, teacher: Any, max_tokens: int) -> tuple[list[Twice], list[Refused]]:
    """Encode rows; those with more than `max_tokens` tokens in either model are refused with the count."""
    kept, refused = [], []
    for row in rows:
        try:
            item = encode(row, student, teacher)
        except DataError as error:
            refused.append(Refused(row.source, row.line, error.what, row.prompt[:200]))
            continue
        longest = max(len(item.student), len(item.teacher))
        if longest > max_tokens:
            reason = f"too long: {longest:,} tokens, at most {max_tokens:,}"
            refused.append(Refused(row.source, row.line, reason, row.prompt[:200]))
        else:
            kept.append(item)
    return kept, refused


def collate(items: Sequence[Twice], pad: int, teacher_pad: int) -> dict[str, Any]:
    """The student's batch, the teacher's `teacher_input_ids` and `teacher_attention_mask` [B, T'], and `pairs` [M, 3].

    A pair is the row, and the student's and the teacher's position whose hidden states predict the paired tokens.
    """
    import torch

    batch = tokens.collate([item.student for item in items], pad)
    theirs = tokens.collate([item.teacher for item in items], teacher_pad)
    pairs = [
        (b, len(item.student.prompt) + i - 1, len(item.teacher.prompt) + j - 1)
        for b, item in enumerate(items)
        for i, j in item.pairs
    ]
    return batch | {
        "teacher_input_ids": theirs["input_ids"],
        "teacher_attention_mask": theirs["attention_mask"],
        "pairs": torch.tensor(pairs, dtype=torch.long).reshape(-1, 3),
    }


class CrossVocabulary(Objective):
    """Teach a student to answer like a teacher that speaks other tokens.

    Inputs: what `collate` makes; outputs.hidden and outputs.head of the student.

    Args:
        loss: A loss with `one_vocabulary = False`.
        teacher: A causal language model; frozen and put into evaluation mode.
        label_weight: w, of the cross-entropy of all answer tokens; the paper adds it with weight 1.
    """

    wants = "hidden"

    def __init__(self, loss: Divergence, teacher: Any, label_weight: float = 0.0) -> None:
        super().__init__()
        self.loss, self.label_weight = loss, label_weight
        self._teacher = [LiveTeacher(teacher)]  # a list keeps it out of parameters() and state_dict()

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, trained tokens)."""
        assert outputs.hidden is not None
        assert outputs.head is not None
        row, mine, theirs = batch["pairs"].unbind(1)
        teacher = self._teacher[0]
        heard = {"input_ids": batch["teacher_input_ids"], "attention_mask": batch["teacher_attention_mask"]}
        said = teacher.all_hidden(heard)[row, theirs]
        total, _ = self.loss.fused(outputs.hidden[row, mine], outputs.head, said, teacher.head)
        mask, targets = next_token_positions(batch["labels"])
        if self.label_weight:
            total = total + self.label_weight * cross_entropy_sum(outputs.hidden[mask], outputs.head, targets)
        return total, mask.sum()


def _offsets(row: Row, tokenizer: Any) -> list[tuple[int, int]]:
    """(start, end) of the answer's tokens in the answer itself; what the template adds behind it has no width."""
    _, answer, end = tokens.rendered(row, tokenizer)
    mark = "\ue000"  # stands where the answer will stand, whatever the template puts around it
    _, blank, _ = tokens.rendered(replace(row, messages=(*row.messages[:-1], (row.messages[-1][0], mark))), tokenizer)
    begin = blank.find(mark)
    if begin < 0 or not answer.startswith(row.answer, begin):
        raise DataError(
            "the chat template changes the answer, so two encodings of it cannot be aligned",
            where=row.id,
            hint="give rows as prompt/completion",
        )
    try:
        found = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    except NotImplementedError:
        raise DataError("this tokenizer gives no character offsets; a fast one does", where=row.id) from None
    length = len(row.answer)
    offsets = [(min(max(a - begin, 0), length), min(max(b - begin, 0), length)) for a, b in found]
    return offsets + [(length, length)] * len(end)
