"""Cross-entropy of a linear head on an encoder's features: the plain baseline that prototype methods are held against.

    loss sum = Σ_b −log softmax(W u_b + b)[y_b],  u = √D z / ‖z‖

The head is part of the objective; its gradient shapes the features. It does not depend on how a step is cut. Features
are brought to length √D (our choice), which is about what a layer norm or standardising gives them, so that the head
also fits vectors that are saved at length 1: `class_head` says how.

Source: multinomial logistic regression on learnt features is textbook; fine-tuning an encoder under such a head is
BERT's (Devlin et al., NAACL 2019, arXiv 1810.04805).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from residency.labelloss import label_loss
from residency.objective import Objective, Outputs


class LinearLoss(Objective):
    """Cross-entropy under a trained linear head.

    Inputs: outputs.features [B, D], `labels` [B].

    Args:
        classes: C.
        width: D.
    """

    wants = "features"
    per_row = True

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, rows)."""
        assert outputs.features is not None
        z = outputs.features.to(self.head.weight.dtype)
        logits = self.head(nn.functional.normalize(z, dim=-1, eps=1e-3) * z.shape[-1] ** 0.5)
        return label_loss(logits, batch["labels"]), batch["labels"].new_tensor(len(batch["labels"]))

    def class_head(self) -> tuple[Tensor, Tensor]:
        """Weight [C, D] and bias [C] of the same classifier for features of length 1."""
        return self.head.weight.detach() * self.head.in_features**0.5, self.head.bias.detach().clone()
