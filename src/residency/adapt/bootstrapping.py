"""Collective bootstrapping: what rows that look alike think of a row, as a soft label for it.

Every key z'_j of the queue has an opinion o_j over classes, that of the classifier and that of the prototypes; a row
takes the mean of their opinions, weighed by how much it looks like them:

    o_j  = α softmax(aux(z'_j)) + (1 − α) softmax(z'_j · c / τ)
    a_ij = clip(z_i · z'_j, 0, 1) + ε, normalised over j;          b_i = Σ_j a_ij o_j          (no gradient)

b is the target of the auxiliary classifier, L = (1 − β) CE(q, y) + β (−Σ_k b_k log q_k): cross-entropy with b, so
KL(b ‖ q) up to a constant, as the release computes it (its figure writes KL(q ‖ b)).

Cost: B × Q × (d + C) multiplications; the opinions, Q × d × C, once per step.

Paper: Qin et al., CAPro, NeurIPS 2023, arXiv 2310.09761; official code github.com/yuleiqin/capro, commit bd1771c (no
licence; read for facts).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7


@torch.no_grad()
def collective(z: Tensor, keys: Tensor, opinions: Tensor) -> Tensor:
    """b, the mean opinion of the keys that look like a row.

    Args:
        z: Unit rows [B, d].
        keys: Unit keys [Q, d], at least one.
        opinions: [Q, C], or [Q, C] of independent labels.

    Returns:
        [B, C]; a probability vector per row where opinions are.
    """
    with torch.autocast(z.device.type, enabled=False):
        alike = (z.to(keys.dtype) @ keys.T).clamp_(0, 1).add_(EPSILON)
        return (alike @ opinions.to(keys.dtype)) / alike.sum(1, keepdim=True)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[B] −Σ_k b_k log softmax(logits)_k, in at least float32."""
    logp = (logits.float() if logits.dtype.itemsize < 4 else logits).log_softmax(-1)
    return -(targets.to(logp.dtype) * logp).sum(-1)
