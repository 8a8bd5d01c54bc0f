"""Similarities, and the one contrastive kernel that prototype methods share.

For anchors z_b, candidates a_s with similarities g_bs, temperature τ and positives P_b among the candidates A_b:

    log of sum    L_b = −log( 1/|P_b| · Σ_{p ∈ P_b} e^{g_bp/τ} / Σ_{a ∈ A_b} e^{g_ba/τ} )
    sum of logs   L_b = −1/|P_b| · Σ_{p ∈ P_b} log( e^{g_bp/τ} / Σ_{a ∈ A_b} e^{g_ba/τ} )

The first is never larger than the second (Jensen), and both are the cross-entropy over candidates where an anchor has
one positive: prototypes, InfoNCE and CLIP are that case. The factor 1/|P_b| in the first has no gradient; it only makes
losses of classes of unequal size comparable. An anchor without a positive gives 0 and no gradient.

`SupCon` is the second form within a batch: the baseline that has no prototypes, and whose anchors in small batches
mostly have no positive.

Cost: B × S × D multiplications and two reductions over [B, S].

Papers: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362 (its L_out is the sum of logs,
its L_in the log of sum); van den Oord, Li, Vinyals, 2018, arXiv 1807.03748 (InfoNCE).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from residency.objective import Objective, Outputs

Kind = Literal["cos", "halfcos", "dot", "neg_sqeuclid"]


def similarity(a: Tensor, b: Tensor, kind: Kind = "cos") -> Tensor:
    """Similarities [..., B, S] of vectors [..., B, D] and [..., S, D].

    Args:
        a: Anchors.
        b: Candidates.
        kind: cos; halfcos = (1 + cos) / 2, in [0, 1]; dot; neg_sqeuclid = −‖a − b‖². Cosines are computed in at least
            float32.

    Raises:
        ValueError: For another kind.
    """
    if kind in ("cos", "halfcos"):
        with torch.autocast(a.device.type, enabled=False):  # divided by τ, a cosine of 8 bits is too coarse
            a, b = (x.float() if x.dtype.itemsize < 4 else x for x in (a, b))
            cos = nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).mT
        return cos if kind == "cos" else (1 + cos) / 2
    if kind == "dot":
        return a @ b.mT
    if kind == "neg_sqeuclid":
        return -((a * a).sum(-1)[..., None] + (b * b).sum(-1)[..., None, :] - 2 * a @ b.mT).clamp_min(0)
    raise ValueError(f"a similarity is cos, halfcos, dot or neg_sqeuclid, not {kind!r}")


def multi_positive_nce(
    sim: Tensor,
    positive: Tensor,
    *,
    tau: float | Tensor = 0.1,
    exclude: Tensor | None = None,
    reduce: Literal["log_sum", "sum_log"] = "log_sum",
) -> Tensor:
    """The kernel above.

    Args:
        sim: [B, S] similarities.
        positive: [B, S] bool.
        tau: Temperature: a number, or one per candidate [S].
        exclude: [B, S] bool, candidates an anchor does not see (itself); also taken out of `positive`.
        reduce: Which form.

    Returns:
        [B] losses in at least float32; 0 without gradient where an anchor has no positive.

    Raises:
        ValueError: For another form, or a mask of another shape.
    """
    if positive.shape != sim.shape or (exclude is not None and exclude.shape != sim.shape):
        raise ValueError(f"the masks must have the similarities' shape {[*sim.shape]}, got {[*positive.shape]}")
    if reduce not in ("log_sum", "sum_log"):
        raise ValueError(f"reduce is log_sum or sum_log, not {reduce!r}")
    logits = (sim.float() if sim.dtype.itemsize < 4 else sim) / tau
    if exclude is not None:
        positive = positive & ~exclude
        logits = logits.masked_fill(exclude, -torch.inf)
    count = positive.sum(-1)
    has = count > 0
    logits = logits.masked_fill(~has[:, None], 0.0)  # rows without a positive must not put NaN into a gradient
    logp = logits.log_softmax(-1)
    if reduce == "log_sum":
        inner = logp.masked_fill(~positive, -torch.inf).masked_fill(~has[:, None], 0.0).logsumexp(-1)
        found = count.clamp_min(1).to(logp.dtype).log() - inner
    else:
        found = -logp.masked_fill(~positive, 0.0).sum(-1) / count.clamp_min(1)
    return torch.where(has, found, torch.zeros_like(found))


class SupCon(Objective):
    """Supervised contrastive loss within a batch, with a linear head beside it that does not shape the features.

    Loss sum = Σ_b SupCon_b + CE(W sg[z_b], y_b). It depends on who is in the batch: another cut of an optimiser step
    into batches is another loss.

    Inputs: outputs.features [B, D], `labels` [B].

    Args:
        classes: C.
        width: D.
        temperature: τ (the paper's 0.1).
        reduce: The paper's L_out ("sum_log"), or L_in.
    """

    wants = "features"
    per_row = True

    def __init__(
        self,
        classes: int,
        width: int,
        temperature: float = 0.1,
        reduce: Literal["log_sum", "sum_log"] = "sum_log",
    ) -> None:
        super().__init__()
        self.temperature, self.reduce = temperature, reduce
        self.head = nn.Linear(width, classes)

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, rows)."""
        assert outputs.features is not None
        z, y = outputs.features, batch["labels"]
        same = y[:, None] == y[None]
        own = torch.eye(len(y), dtype=torch.bool, device=y.device)
        losses = multi_positive_nce(similarity(z, z), same, tau=self.temperature, exclude=own, reduce=self.reduce)
        head = nn.functional.cross_entropy(self.head(z.detach().to(self.head.weight.dtype)), y, reduction="sum")
        return losses.sum() + head, y.new_tensor(len(y))
