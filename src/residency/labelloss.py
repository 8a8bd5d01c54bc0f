"""The loss of a classification or regression head on labelled texts.

For logits z [B, C] and class indices y [B]: loss sum = Σ −log softmax(z_b)[y_b]. For one output z [B, 1] and numbers
y [B]: loss sum = Σ (z_b − y_b)². The count is B, so that the mean over an optimiser step does not depend on how it was
cut into batches.

Source: logistic and least-squares regression are textbook; a head on the first token of a fine-tuned encoder is BERT's
(Devlin et al., NAACL 2019, arXiv 1810.04805). Equal to `torch.nn.functional.cross_entropy` and `mse_loss` with
reduction="sum".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from residency.objective import Objective, Outputs


class LabelLoss(Objective):
    """Cross-entropy or squared error of a head's outputs, by the type of the labels.

    Inputs: outputs.logits [B, C]; `labels` [B], integers for classes or floats for numbers (then C = 1).
    """

    wants = "logits"
    per_row = True

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, rows)."""
        assert outputs.logits is not None
        return label_loss(outputs.logits, batch["labels"]), batch["labels"].new_tensor(len(batch["labels"]))


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss sum of logits [B, C] and labels [B]: cross-entropy of integer labels, squared error of float ones.

    Raises:
        ValueError: When float labels meet more than one output, or the numbers of rows differ.
    """
    if len(logits) != len(labels):
        raise ValueError(f"logits {[*logits.shape]} and labels {[*labels.shape]} must have the same number of rows")
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    if not labels.is_floating_point():
        return nn.functional.cross_entropy(logits, labels, reduction="sum")
    if logits.shape[1:] != (1,):
        raise ValueError(f"regression needs one output per row, [B, 1], got {[*logits.shape]}")
    return (logits[:, 0] - labels).square().sum()
