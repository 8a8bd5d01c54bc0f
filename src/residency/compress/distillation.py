"""Distillation as an `Objective`: a student learns from a teacher that runs beside it, or from what it said once.

Language models. For every trained position the last hidden states of student [N, Ds] and teacher [N, Dt] are gathered
first (prompt and padding never meet a head), and the loss works on hidden states and heads. With `label_weight` w > 0
the cross-entropy of the reference answers is added:

    loss sum = Σ_t ℓ(student_t, teacher_t) + w · Σ_t −log p_student(y_t)

Classifiers and regressors. The same on the heads' outputs [B, C], where w weighs the loss of the labels. A regressor
has one output and no distribution, so the teacher's number itself is imitated: (z_student − z_teacher)², as in SinKD's
setting of GLUE's similarity task.

The teacher is frozen, in evaluation mode, and no part of the objective's state: it is neither trained nor saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from residency.compress.bild import BiLD
from residency.compress.divergence import Divergence
from residency.compress.kl import KL
from residency.compress.teacher import CachedTeacher, LiveTeacher, bild_of_top_k, first_words, kl_of_top_k
from residency.errors import PlanError
from residency.fusedhead import cross_entropy_sum, fused_sum
from residency.labelloss import label_loss
from residency.objective import Head, Objective, Outputs, next_token_positions


class Distillation(Objective):
    """Teach a student language model to answer like its teacher.

    Inputs: `input_ids`, `attention_mask`, `labels` [B, T], and `ids` for a cached teacher; outputs.hidden and
    outputs.head of the student.

    Args:
        loss: A loss with a fused form; from a top-k cache, KL at temperature 1 or teacher-led BiLD.
        teacher: Live or cached; a bare model is taken as live.
        label_weight: w, the weight of the cross-entropy on the reference answers; the BiLD paper uses none.
        vocabulary: Compare only the first so many words, where one vocabulary extends or pads the other; what a larger
            student gives to words beyond them is driven out (`outside_sum`).

    Raises:
        PlanError: From `forward`, when the vocabularies have different sizes.
    """

    wants = "hidden"

    def __init__(
        self,
        loss: Divergence,
        teacher: Any,
        label_weight: float = 0.0,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.label_weight, self.vocabulary = loss, label_weight, vocabulary
        known = isinstance(teacher, LiveTeacher | CachedTeacher)
        # a list keeps the teacher out of parameters() and state_dict()
        self._teacher: list[Any] = [teacher if known else LiveTeacher(teacher, vocabulary)]
        if self._from_top_k:
            check_top_k_loss(loss)

    @property
    def _from_top_k(self) -> bool:
        teacher = self._teacher[0]
        return isinstance(teacher, CachedTeacher) and teacher.what == "top-k"

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, trained tokens)."""
        assert outputs.hidden is not None
        assert outputs.head is not None
        mask, targets = next_token_positions(batch["labels"])
        student, head = outputs.hidden[mask], first_words(outputs.head, self.vocabulary)
        if self._from_top_k:
            said = self._teacher[0].top_k(batch, mask)
            if isinstance(self.loss, BiLD):
                total = bild_of_top_k(student, head, said, self.loss.params)
            else:
                total = kl_of_top_k(student, head, said)
        else:
            teacher, teacher_head = self._teacher[0].hidden(batch, mask), self._teacher[0].head
            if len(teacher_head.weight) != len(head.weight):
                raise PlanError(
                    f"the teacher has {len(teacher_head.weight):,} tokens and the student {len(head.weight):,}",
                    hint="word-by-word distillation needs one vocabulary; loss: uld does not",
                )
            total, _ = self.loss.fused(student, head, teacher, teacher_head, targets)
        if len(head.weight) < len(outputs.head.weight):
            total = total + outside_sum(student, outputs.head, len(head.weight))
        if self.label_weight:
            total = total + self.label_weight * cross_entropy_sum(student, outputs.head, targets)
        return total, mask.sum()


def outside_sum(hidden: Tensor, head: Head, shared: int) -> Tensor:
    """Σ −log q(shared words): what KL to a teacher without the other words has beside the KL among the shared ones.

    Without it nothing would keep a student with a larger vocabulary from saying words its teacher does not have.

    Args:
        hidden: [N, D] of the student; receives the gradient, as does `head`.
        head: Weight [V, D].
        shared: The first so many of the V words are the teacher's.
    """

    def row_loss(logits: Tensor, rows: slice, differentiate: bool) -> Tensor:
        inside = logits[:, :shared]
        total = (logits.logsumexp(1) - inside.logsumexp(1)).sum()
        if differentiate:
            among = inside.softmax(1)
            logits.copy_(logits.softmax(1))
            logits[:, :shared] -= among
        return total

    return fused_sum(hidden, head, row_loss)


def check_top_k_loss(loss: Any, words: int = 0, vocabulary: int = 0) -> None:
    """Refuse a loss that a top-k cache cannot serve.

    Args:
        loss: The loss.
        words: Words per token of the cache; 0 when not known.
        vocabulary: Of the teacher; 0 when not known.

    Raises:
        PlanError: With what it lacks.
    """
    if 0 < vocabulary < words:
        raise PlanError(f"teacher-words: {words}, but the vocabulary has {vocabulary:,}")
    if isinstance(loss, BiLD) and loss.params.directions == "teacher":
        if 0 < words < loss.params.k:
            raise PlanError(f"BiLD compares {loss.params.k} words, and teacher-words is {words}")
        return
    if isinstance(loss, KL) and loss.params.temperature == 1:
        return
    raise PlanError(
        f"a top-k cache of the teacher cannot serve {loss!r}",
        hint="it serves kl at temperature 1 and bild with directions: teacher; a cache of hidden states serves all",
    )


class HeadDistillation(Objective):
    """Teach a student classifier or regressor to answer like its teacher.

    Inputs: what the encoder reads, `labels` [B]; outputs.logits [B, C] of the student.

    Args:
        loss: A loss with a dense form on [B, C]; not used for one output.
        teacher: A sequence classifier with the student's classes, in the same order.
        label_weight: w, the weight of the loss of the labels.
    """

    wants = "logits"
    per_row = True

    def __init__(self, loss: Divergence, teacher: Any, label_weight: float = 0.0) -> None:
        super().__init__()
        self.loss, self.label_weight = loss, label_weight
        self._teacher = [teacher.requires_grad_(False).eval()]

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, rows)."""
        from residency.train import MODEL_INPUTS

        assert outputs.logits is not None
        labels, student = batch["labels"], outputs.logits
        with torch.no_grad():
            teacher = self._teacher[0](**{name: batch[name] for name in MODEL_INPUTS if name in batch}).logits
        if teacher.shape != student.shape:
            raise PlanError(f"the teacher has {teacher.shape[1]} outputs and the student {student.shape[1]}")
        if labels.is_floating_point():
            total = label_loss(student, teacher[:, 0].float())
        else:
            total, _ = self.loss.dense(student, teacher, labels)
        if self.label_weight:
            total = total + self.label_weight * label_loss(student, labels)
        return total, labels.new_tensor(len(labels))
