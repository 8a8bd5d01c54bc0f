"""A token-level distillation loss as an `Objective`: the teacher runs beside the student, both LM heads stay fused.

For every trained position the last hidden states of student [N, Ds] and teacher [N, Dt] are gathered first (prompt
and padding never meet a head), and the loss works on hidden states and heads. With `label_weight` w > 0 the
cross-entropy of the reference answers is added:

    loss sum = Σ_t ℓ(student_t, teacher_t) + w · Σ_t −log p_student(y_t)

The teacher is frozen, in evaluation mode, and no part of the objective's state: it is neither trained nor saved.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from residency.errors import PlanError
from residency.fusedhead import cross_entropy_sum
from residency.objective import Head, Objective, Outputs, next_token_positions


class FusedLoss(Protocol):
    """What `BiLD` and `KL` offer."""

    def fused(
        self, student_hidden: Tensor, student_head: Head, teacher_hidden: Tensor, teacher_head: Head
    ) -> tuple[Tensor, Tensor]:
        """(sum, count) over N tokens."""
        ...


class Distillation(Objective):
    """Teach a student to answer like its teacher.

    Inputs: `input_ids`, `attention_mask`, `labels` [B, T]; outputs.hidden and outputs.head of the student.

    Args:
        loss: A loss with a fused form.
        teacher: A causal language model with the student's vocabulary.
        label_weight: w, the weight of the cross-entropy on the reference answers; the BiLD paper uses none.

    Raises:
        PlanError: From `forward`, when the vocabularies have different sizes.
    """

    wants = "hidden"

    def __init__(self, loss: FusedLoss, teacher: nn.Module, label_weight: float = 0.0) -> None:
        super().__init__()
        self.loss, self.label_weight = loss, label_weight
        # a list keeps the teacher out of parameters() and state_dict()
        self._teacher = [teacher.requires_grad_(False).eval()]
        self._checked = False

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, trained tokens)."""
        assert outputs.hidden is not None
        assert outputs.head is not None
        mask, targets = next_token_positions(batch["labels"])
        hidden, head = self._teach(batch)
        if head.weight.shape[0] != outputs.head.weight.shape[0]:
            raise PlanError(
                f"the teacher has {head.weight.shape[0]:,} tokens and the student {outputs.head.weight.shape[0]:,}",
                hint="token-level distillation needs one vocabulary",
            )
        student = outputs.hidden[mask]
        total, count = self.loss.fused(student, outputs.head, hidden[mask], head)
        if self.label_weight:
            total = total + self.label_weight * cross_entropy_sum(student, outputs.head, targets)
        return total, count

    @torch.no_grad()
    def _teach(self, batch: dict[str, Any]) -> tuple[Tensor, Head]:
        """Last hidden states [B, T, Dt] and head of the teacher."""
        teacher: Any = self._teacher[0]
        result = teacher(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        embedding = teacher.get_output_embeddings()
        head = Head(embedding.weight, getattr(embedding, "bias", None))
        hidden = result.hidden_states[-1]
        if not self._checked:
            from residency.train import check_head

            check_head(head, hidden, result.logits)
            self._checked = True
        return hidden, head
