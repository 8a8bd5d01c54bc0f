"""CAPro: noisy labels corrected by prototypes that captions chose, and by what rows that look alike say.

No label need be trusted. Per class, the K rows whose (smoothed) captions are nearest to a text about the class
(`textmatch.py`) stand in for clean ones: prototypes begin as their means, and they keep their labels. Then

    L_cls = CE(p, ŷ)                                        the classifier on encoder features
    L_ins, L_rec                                            instance contrast, and reconstruction in the first phase
    L_pro = CE(z · c / τ, ŷ)                                once there are prototypes
    L_aux = (1 − β) CE(q, ŷ) + β CE(q, b)                    the auxiliary classifier; b of `bootstrapping.py`, over a
                                                            dictionary that already holds the row's own key
    s = α p + (1 − α) softmax(z · c / τ)                    once cleaning has begun: labels ŷ by `correction.py`
    c_y ← m c_y + (1 − m) z                                 with all rows as labelled; from cleaning on with rows kept

Rows that are left out of L_cls, L_pro and L_aux keep L_ins.

The paper's: all of it; τ = 0.1, α = 0.5, β = 0.1, γ = 0.6, m = 0.999, K = 50, Q = 8,192; prototypes and cleaning from
epochs 5 and 10 of 60 (WebVision), 10 and 20 of 120 (Google-500), 10 and 40 of 100 (NUS-WIDE). Here phases begin at the
shares 0.1 and 0.2 by default.

Our choices: auxiliary weights are unit vectors, and logits cosines over τ; opinions are the classifier's alone before
there are prototypes. `official`: auxiliary weights and logits as they are, the uniform opinion of prototypes that are
still zero, means over the rows kept. Several labels per row: `caprolabels.py`.

Cost: above plain cross-entropy, one forward pass of the copy, and B × Q × (d + C) + Q × d × C.

Paper: Qin, Chen, Shen, Fu, Gu, Li, Sun, Ji, "CAPro: Webly Supervised Learning with Cross-Modality Aligned Prototypes",
NeurIPS 2023, arXiv 2310.09761. Official code: github.com/yuleiqin/capro, commit bd1771c (no licence; read for facts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residency.adapt.bootstrapping import collective, soft_cross_entropy
from residency.adapt.contrast import multi_positive_nce
from residency.adapt.correction import Correction, correct, soft_vote
from residency.adapt.noisy import NoisyLabels, Verdict, full, products
from residency.objective import Outputs

CLEAN = 2
"""The phase from which labels are corrected."""


class CAPro(NoisyLabels):
    """The loss above, one label per row.

    Inputs: outputs.features [B, D]; `labels` and `rows` [B], `clean` [B] bool (trusted rows, and those that captions
    chose), `strong` (see `momentum.strong_inputs`).

    Args:
        classes: C.
        width: D.
        model: See `NoisyLabels`.
        starts: When prototypes and cleaning begin, as shares of the training.
        beta: β, weight of the collective opinion; 0 leaves it out.
        more: Further arguments of `NoisyLabels`.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        model: nn.Module | None = None,
        *,
        starts: Sequence[float] = (0.1, 0.2),
        beta: float = 0.1,
        **more: Any,
    ) -> None:
        if len(starts) != 2 or not 0 <= beta <= 1:
            raise ValueError(f"CAPro has two phases behind its first, and β in [0, 1]; not {len(starts)} and {beta}")
        super().__init__(classes, width, model, starts=starts, **more)
        self.beta = beta

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, rows); queue and prototypes take the rows in."""
        phase, y, trusted = int(self.phase), batch["labels"], self.trusted(batch)
        u = self.unit(outputs)
        z = full(self.project(u))
        logits = full(self.classifier(u))
        total = self.contrasted(z, batch)
        if not phase:
            total = total + self.reconstruct * self.reconstruction(u, z).sum()
        cosines = products(z, self.bank.vectors.clone())  # moved below, before the backward pass
        everyone = torch.ones_like(trusted)
        found = Correction(y, everyone, ~everyone, everyone.float())
        if phase >= CLEAN:
            p, q = logits.detach().softmax(-1), self._by_prototypes(cosines.detach())
            scores = soft_vote(p, q, self.alpha)
            found = correct(scores, y, relabel=self.relabel, keep=self.keep, protect=trusted)
        self.traced(found.keep, found.relabelled)
        losses = nn.functional.cross_entropy(logits, found.labels, reduction="none")
        if phase:
            own = nn.functional.one_hot(found.labels, self.classes).bool()
            hidden = (~self.bank.known).expand_as(own)
            losses = losses + multi_positive_nce(cosines, own, tau=self.temperature, exclude=hidden)
        votes = self._votes(z)
        losses = losses + (1 - self.beta) * nn.functional.cross_entropy(votes, found.labels, reduction="none")
        if self.beta and len(self.queue):
            keys = self.queue.filled
            losses = losses + self.beta * soft_cross_entropy(votes, collective(z.detach(), keys, self.opinions(keys)))
        kept = losses.masked_fill(~found.keep, 0.0).sum()
        total = total + (kept * (len(y) / found.keep.sum().clamp_min(1)) if self.official else kept)
        if self.training and phase:
            self.bank.ema_(z.detach()[found.keep], found.labels[found.keep], self.polish)
        return total, y.new_tensor(len(y))

    def contrasted(self, z: Tensor, batch: dict[str, Any]) -> Tensor:
        """The sum of L_ins, and the queue with the batch's keys in it."""
        keys = z.detach() if self.momentum is None else self.keys(batch)
        total = z.sum() * 0
        if self.momentum is not None and self.instance:
            total = self.instance * self.instances(z, keys, batch["rows"]).sum()
        if self.training:
            self.queue.push(keys, batch["rows"][:, None])
        return total

    @torch.no_grad()
    def opinions(self, keys: Tensor) -> Tensor:
        """Opinions o [Q, C] of keys [Q, d]."""
        p = self._votes(keys).softmax(-1)
        if not bool(self.bank.known.any()):
            return soft_vote(p, torch.full_like(p, 1 / self.classes), self.alpha) if self.official else p
        return soft_vote(p, self._by_prototypes(products(keys, self.bank.vectors)), self.alpha)

    @torch.no_grad()
    def judge(self, features: Tensor, labels: Tensor, clean: Tensor) -> Verdict:
        """See `NoisyLabels.judge`."""
        u = self.unit(Outputs(features=features))
        z = full(self.project(u))
        p = full(self.classifier(u)).softmax(-1)
        q = self._by_prototypes(products(z, self.bank.vectors)) if bool(self.bank.known.any()) else p
        scores = soft_vote(p, q, self.alpha)
        found = correct(scores, labels, relabel=self.relabel, keep=self.keep, protect=clean)
        return Verdict(found.labels, found.keep, found.relabelled, scores, p, q, None, z)

    # ------------------------------------------------------------------ parts

    def _votes(self, z: Tensor) -> Tensor:
        """Logits of the auxiliary classifier [B, C]."""
        return full(self.vote(z) / (1.0 if self.official else self.temperature))

    def _by_prototypes(self, cosines: Tensor) -> Tensor:
        return (cosines / self.temperature).masked_fill(~self.bank.known, -torch.inf).softmax(-1)
