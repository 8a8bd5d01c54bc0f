"""FoPro: few trusted rows lead the training on many whose labels are noisy.

Prototypes begin as the means of the trusted rows, contrast pulls rows to the prototype of their label, and as soon as
classifier and prototypes are good enough, their common opinion relabels rows or leaves them out:

    s = α p + (1 − α) softmax(z · c / φ)                          one-hot for trusted rows
    D = ½ |1 − z · c_y| + ½ Σ_{k ≠ y} |c_y · c_k − z · c_k|        does z stand to all prototypes as c_y does?
    φ_k = Σ_i ‖z_i − c_k‖ / (n_k log(n_k + 10))                  over the rows of class k in the epoch before

    first        CE(p, y) + L_rec + L_aux on trusted rows and those with p[y] > γ
    prototypes   (1 − s_y) CE(p, s) + s_y CE(p, y) + CE((z · c − m [trusted, y]) / φ, y) + L_ins
                 + L_aux on trusted rows and those with D ≤ σ, + the relation metric's loss on them
    clean        the same with labels corrected by s; rows left out keep L_ins alone; c_y ← m c_y + (1 − m) z, and φ
                 is renewed
    relation     besides, u = sigmoid(r(z, c)): a label with u_y > γ stands, and is not replaced

with L_aux = CE((cosines to the auxiliary weights − margin at y) / τ, y); the rest is in `noisy.py`, `correction.py`
and `relation.py`.

Phases. The paper (E epochs; prototypes, cleaning, relation from): 200; 20, 25, 26 on WebFG-496, 50; 15, 19, 20 on
WebVision and Google-500. Its recipe stops after the second, trains the relation metric alone, and goes on. Here the
metric trains on detached vectors from the first prototypes on, within one training, which touches nothing else
(our choice).

Our choices besides: σ grows with the classes, σ = 0.05 C (the paper's 20 is a mean difference of cosines of 0.04 to
0.2 at its 1,000 to 200 classes, and never binds at ten); s_y is the score of the label as it now is; φ of a class
without rows stays as it was, and none falls below `FLOOR`; prototypes are polished with the model's own features,
and L_aux sees the rows once.
`official` does as the release: σ = 20; s_y of the label as given; the relation metric learns from relabelled rows only
once it is in use; polishing with the momentum copy's features; L_aux on the other view too (a second pass of the model
with gradient); auxiliary weights of any length; means over the rows kept.

Cost: above plain cross-entropy, one forward pass of the copy and B × Q × d. With `official`, a second forward and
backward pass and a second pass of the copy.

Paper: Qin, Chen, Chen, Shen, Ren, Gu, Yang, Shen, "FoPro: Few-Shot Guided Robust Webly-Supervised Prototypical
Learning", AAAI 2023, arXiv 2212.00465. Official code: github.com/yuleiqin/fopro, commit d0a6a72 (no licence; read for
facts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residency.adapt.bootstrapping import soft_cross_entropy
from residency.adapt.contrast import multi_positive_nce
from residency.adapt.correction import Correction, correct, soft_vote
from residency.adapt.momentum import strong_inputs
from residency.adapt.noisy import NoisyLabels, Verdict, full, products
from residency.adapt.relation import Relation
from residency.objective import Look, Outputs

FLOOR = 0.02
"""Smallest density temperature: without it a class of identical rows has φ = 0."""
SPREAD = 0.05
"""σ / C where none is given."""
PROTOTYPES, CLEAN, RELATION = 1, 2, 3
"""Phases."""


class FoPro(NoisyLabels):
    """The loss above.

    Inputs: outputs.features [B, D]; `labels` and `rows` [B], `clean` [B] bool, `strong` (see `momentum.strong_inputs`).

    Args:
        classes: C.
        width: D.
        model: See `NoisyLabels`.
        starts: When prototypes, cleaning and the relation metric begin, as shares of the training.
        margin: m of trusted rows towards their prototype, and of L_aux.
        sigma: σ; None for 0.05 C.
        more: Further arguments of `NoisyLabels`.
    """

    density: Tensor
    visited: Tensor
    distance: Tensor

    def __init__(
        self,
        classes: int,
        width: int,
        model: nn.Module | None = None,
        *,
        starts: Sequence[float] = (0.3, 0.4, 0.5),
        margin: float = 0.5,
        sigma: float | None = None,
        **more: Any,
    ) -> None:
        if len(starts) != 3:
            raise ValueError(f"FoPro has three phases behind its first, not {len(starts)}")
        super().__init__(classes, width, model, starts=starts, **more)
        self.margin = margin
        self.sigma = (20.0 if self.official else SPREAD * classes) if sigma is None else sigma
        self.relation = Relation(self.auxiliary.in_features)
        self.register_buffer("density", torch.full((classes,), self.temperature))
        self.register_buffer("visited", torch.zeros(classes))
        self.register_buffer("distance", torch.zeros(classes))

    @torch.no_grad()
    def begin_epoch(self, epoch: int, epochs: int, look: Look) -> Sequence[int] | None:
        """Besides the phase and the first prototypes, the densities of the epoch before."""
        n = self.visited
        fresh = (self.distance / (n * (n + 10).log()).clamp_min(1e-12)).clamp_min(FLOOR)
        self.density.copy_(torch.where(n > 0, fresh, self.density))
        self.visited.zero_()
        self.distance.zero_()
        return super().begin_epoch(epoch, epochs, look)

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, rows); queue, prototypes and densities take the rows in."""
        phase, y, trusted = int(self.phase), batch["labels"], self.trusted(batch)
        u = self.unit(outputs)
        z = self.project(u)
        logits = full(self.classifier(u))
        if not phase:
            plain = nn.functional.cross_entropy(logits, y, reduction="none")
            sure = trusted | (self._at(logits.detach().softmax(-1), y) > self.relabel)
            self.traced(torch.ones_like(trusted), torch.zeros_like(trusted))
            losses = plain + self.reconstruct * self.reconstruction(u, self.project(u.detach()))
            return self._summed(losses, None) + self._auxiliary(z, batch, y, sure), y.new_tensor(len(y))
        z = full(z)
        cosines = products(z, self.bank.vectors.clone())  # polished below, before the backward pass
        scores, _, _ = self._scores(logits, cosines.detach(), y, trusted)
        second = self._second(z.detach()) if phase >= RELATION else None
        if phase >= CLEAN:
            found = correct(
                scores, y, relabel=self.relabel, keep=self.keep, protect=trusted, second=second, official=self.official
            )
            near = found.keep
        else:
            everyone = torch.ones_like(trusted)
            found = Correction(y, everyone, ~everyone, self._at(scores, y))
            near = trusted | (self.unlike(cosines.detach(), y) <= self.sigma)
        self.traced(found.keep, found.relabelled)
        hard = nn.functional.cross_entropy(logits, found.labels, reduction="none")
        soft = soft_cross_entropy(logits, scores)
        losses = found.confidence * hard + (1 - found.confidence) * soft + self._pull(cosines, found.labels, trusted)
        total = self._summed(losses, found.keep) + self._auxiliary(z, batch, found.labels, near)
        learns = found.relabelled if self.official and phase >= RELATION else near
        total = total + self._relation(z.detach(), found.labels, learns)
        if self.momentum is not None and self.instance:
            keys = self.keys(batch)
            total = total + self.instance * self.instances(z, keys, batch["rows"]).sum()
            if self.training:
                self.queue.push(keys, batch["rows"][:, None])
        if self.training and phase >= CLEAN:
            self._polish(z, batch, found)
        return total, y.new_tensor(len(y))

    def unlike(self, cosines: Tensor, y: Tensor) -> Tensor:
        """D [B] of rows whose cosines to the prototypes are [B, C]."""
        own = products(self.bank.vectors, self.bank.vectors)
        apart = (own[y] - cosines).abs().masked_fill(~self.bank.known, 0.0)
        return 0.5 * apart.sum(-1)  # c_y · c_y = 1: the entry of y itself is |1 − z · c_y|

    @torch.no_grad()
    def judge(self, features: Tensor, labels: Tensor, clean: Tensor) -> Verdict:
        """See `NoisyLabels.judge`."""
        u = self.unit(Outputs(features=features))
        z = full(self.project(u))
        logits = full(self.classifier(u))
        if not bool(self.bank.known.any()):
            p = soft_vote(logits.softmax(-1), logits.softmax(-1), self.alpha, labels, clean)
            found = correct(p, labels, relabel=self.relabel, keep=self.keep, protect=clean)
            return Verdict(found.labels, found.keep, found.relabelled, p, logits.softmax(-1), p, None, z)
        scores, p, q = self._scores(logits, products(z, self.bank.vectors), labels, clean)
        second = self._second(z) if int(self.phase) >= RELATION else None
        found = correct(scores, labels, relabel=self.relabel, keep=self.keep, protect=clean, second=second)
        return Verdict(found.labels, found.keep, found.relabelled, scores, p, q, second, z)

    # ------------------------------------------------------------------ parts

    @torch.no_grad()
    def _scores(self, logits: Tensor, cosines: Tensor, y: Tensor, trusted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s, p and the prototypes' probabilities, [B, C] each."""
        p = logits.softmax(-1)
        q = (cosines / self.density).masked_fill(~self.bank.known, -torch.inf).softmax(-1)
        return soft_vote(p, q, self.alpha, y, trusted), p, q

    @torch.no_grad()
    def _second(self, z: Tensor) -> Tensor:
        return full(self.relation(z, self.bank.vectors)).sigmoid().masked_fill(~self.bank.known, 0.0)

    def _pull(self, cosines: Tensor, y: Tensor, trusted: Tensor) -> Tensor:
        """CE over prototypes [B], trusted rows with a margin; 0 for a label that has no prototype."""
        own = nn.functional.one_hot(y, self.classes).bool()
        sim = cosines - self.margin * (own & trusted[:, None]).to(cosines.dtype)
        hidden = (~self.bank.known).expand_as(own)
        return multi_positive_nce(sim, own, tau=self.density, exclude=hidden)

    def _auxiliary(self, z: Tensor, batch: dict[str, Any], y: Tensor, rows: Tensor) -> Tensor:
        """The sum of L_aux over some rows."""
        own = nn.functional.one_hot(y, self.classes)
        views = [z]
        if self.official and self.momentum is not None:
            other = self.momentum.followed(**strong_inputs(batch)).features
            views.append(self.project(self.unit(Outputs(features=other))))
        found = torch.stack(
            [
                nn.functional.cross_entropy(
                    full(self.vote(v) - self.margin * own) / self.temperature, y, reduction="none"
                )
                for v in views
            ]
        ).mean(0)
        return self._summed(found, rows)

    def _relation(self, z: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        scores = full(self.relation(z, self.bank.vectors.clone())).masked_fill(~self.bank.known, -torch.inf)
        own = nn.functional.one_hot(y, self.classes).bool()
        return self._summed(
            multi_positive_nce(scores, own & self.bank.known, tau=1.0, exclude=(~self.bank.known).expand_as(own)), rows
        )

    def _summed(self, losses: Tensor, rows: Tensor | None) -> Tensor:
        """The sum over some rows; in the release their mean, times the batch's rows."""
        if rows is None:
            return losses.sum()
        kept = losses.masked_fill(~rows, 0.0).sum()
        return kept * (len(rows) / rows.sum().clamp_min(1)) if self.official else kept

    @torch.no_grad()
    def _polish(self, z: Tensor, batch: dict[str, Any], found: Correction) -> None:
        """Move prototypes to the rows kept, and take down how far those are from them."""
        if self.official and self.momentum is not None:
            z = self.keys(batch, strong=False)
        z, y = z.detach()[found.keep], found.labels[found.keep]
        far = (z - self.bank.vectors[y]).norm(dim=-1)
        self.visited += y.bincount(minlength=self.classes)
        self.distance.index_add_(0, y, far.to(self.distance.dtype))
        self.bank.ema_(z, y, self.polish)

    @staticmethod
    def _at(scores: Tensor, y: Tensor) -> Tensor:
        return scores.gather(1, y[:, None])[:, 0]
