"""Next-token cross-entropy on the answer's tokens only, with the LM head fused into the loss.

For a batch of token ids x [B, T] and labels that are IGNORE outside the answers,

    loss sum = − Σ_{t: y_{t+1} trained} log softmax(W h_t)[y_{t+1}],        count = number of such t.

Only the hidden states of those positions are multiplied with the head W [V, D], chunk by chunk, and the gradient is
computed in the same sweep, so that [B, T, V] logits never exist: at 4 × 512 tokens and V = 49,152 they would take
400 MB in float32, twice that with their gradient. Equal to `torch.nn.functional.cross_entropy(logits, labels,
reduction="sum")` on the shifted labels.

Loss on answer tokens only is what instruction tuning does (Ouyang et al. 2022, arXiv 2203.02155); the fused form is
the idea of Wijmans et al. 2024 ("Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009) and of
Liger Kernel, written here in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from residency.fusedhead import cross_entropy_sum
from residency.objective import Objective, Outputs, next_token_positions


class CrossEntropy(Objective):
    """Next-token cross-entropy as an `Objective`; nats, summed over trained tokens.

    Inputs: `labels` [B, T] with `IGNORE` on prompt and padding; outputs.hidden [B, T, D] and outputs.head, or
    outputs.logits [B, T, V] (the dense form).
    Relations: for a smaller student of a tuned model, prefer the distillation objectives of `residency.compress`.
    """

    wants = "hidden"

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, trained tokens)."""
        mask, targets = next_token_positions(batch["labels"])
        count = mask.sum()
        if outputs.logits is not None:
            from torch.nn.functional import cross_entropy

            return cross_entropy(outputs.logits[mask].float(), targets, reduction="sum"), count
        assert outputs.hidden is not None
        assert outputs.head is not None
        return cross_entropy_sum(outputs.hidden[mask], outputs.head, targets), count
