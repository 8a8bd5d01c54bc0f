"""Which labels to believe, given what a classifier and prototypes say.

Two opinions are mixed, s = α p + (1 − α) q, with p from the classifier and q from the prototypes. Then, row by row:

    1. max s > γ             the label becomes the argmax
    2. otherwise s[y] > keep  the given label stands              (keep is 1/C: better than chance)
    3. otherwise             the row is taken out

Trusted rows are protected: they are kept with their label whatever is said. A second opinion that decides by itself
(FoPro's learned metric u) may be given: a label with u[y] > γ stands, and is not replaced.

`official` reproduces a habit of FoPro's release in `confidence`: the score of the label as given, even where it has
been replaced; here it is the score of the label as it now is.

Cost: two reductions over [B, C].

Papers: Li et al., "MoPro: Webly Supervised Learning with Momentum Prototypes", ICLR 2021, arXiv 2009.07995 (the rule);
Qin et al., FoPro, AAAI 2023, arXiv 2212.00465; Qin et al., CAPro, NeurIPS 2023, arXiv 2310.09761.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Correction:
    """What became of the labels of N rows.

    Args:
        labels: [N] as they now are.
        keep: [N] bool; False where a row is taken out.
        relabelled: [N] bool.
        confidence: [N] score of the label in `labels`; 1 where it is protected.
    """

    labels: Tensor
    keep: Tensor
    relabelled: Tensor
    confidence: Tensor


def soft_vote(p: Tensor, q: Tensor, alpha: float, labels: Tensor | None = None, fixed: Tensor | None = None) -> Tensor:
    """α p + (1 − α) q, one-hot for protected rows.

    Args:
        p: [N, C] probabilities of the classifier.
        q: [N, C] probabilities of the prototypes.
        alpha: α, weight of the classifier.
        labels: [N] given labels, needed with `fixed`.
        fixed: [N] bool, protected rows.

    Returns:
        [N, C].

    Raises:
        ValueError: For an α outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"the classifier's weight lies between 0 and 1, not {alpha}")
    s = alpha * p + (1 - alpha) * q
    if fixed is None:
        return s
    if labels is None:
        raise ValueError("protected rows need their labels")
    return torch.where(fixed[:, None], torch.nn.functional.one_hot(labels, s.shape[1]).to(s.dtype), s)


def correct(
    scores: Tensor,
    labels: Tensor,
    *,
    relabel: float,
    keep: float | None = None,
    protect: Tensor | None = None,
    second: Tensor | None = None,
    official: bool = False,
) -> Correction:
    """The rule above.

    Args:
        scores: s [N, C], rows sum to 1.
        labels: y [N] as given.
        relabel: γ.
        keep: Threshold on s[y]; 1/C if None.
        protect: [N] bool, trusted rows.
        second: u [N, C] in [0, 1], a second opinion.
        official: Confidence of the given instead of the present label.

    Returns:
        A `Correction`.

    Raises:
        ValueError: When shapes do not fit.
    """
    if scores.dim() != 2 or labels.shape != scores.shape[:1] or (second is not None and second.shape != scores.shape):
        raise ValueError(f"scores are [N, C] and labels [N], got {[*scores.shape]} and {[*labels.shape]}")
    at = labels[:, None]
    own = scores.gather(1, at)[:, 0]
    best, guess = scores.max(1)
    trusted = torch.zeros_like(labels, dtype=torch.bool) if protect is None else protect
    firm = trusted if second is None else trusted | (second.gather(1, at)[:, 0] > relabel)
    sure = best > relabel
    moved = sure & ~firm & (guess != labels)
    held = firm | sure | (own > (1 / scores.shape[1] if keep is None else keep))
    now = torch.where(moved, guess, labels)
    confidence = own if official else scores.gather(1, now[:, None])[:, 0]
    return Correction(now, held, moved, torch.where(trusted, torch.ones_like(confidence), confidence))
