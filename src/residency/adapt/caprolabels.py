"""CAPro where a row may have several labels, or none: every class is a question of its own.

    z_c = normalise(P_c z + b_c)                            a row as class c sees it, [B, C, d]
    c_c⁺, c_c⁻                                              two prototypes per class, of rows with and without the label
    p_pos = softmax(z_c · (c⁻, c⁺) / τ)₊                     so p_pos + p_neg = 1
    s = α sigmoid(W u) + (1 − α) p_pos                      [B, C]
    a label stands while s > keep, its absence while 1 − s > keep; s > γ adds it, 1 − s > γ removes it; otherwise the
    entry is left out of the losses
    L_cls = mean_c w_c(ŷ) BCE(W u, ŷ),  w_c(1) = √((N − n_c) / n_c)
    L_pro = mean_c CE(z_c · (c⁻, c⁺) / τ, ŷ);  L_aux = mean_c (1 − β) BCE(q, ŷ) + β BCE(q, b)

With keep = 1/C, as published, no entry is ever left out as long as γ ≤ 1 − 1/C: what does not stand with s ≤ 1/C has
1 − s ≥ γ, and is flipped.

`official`: of BCE(q, b) only the half −b log sigmoid(q), which pushes all logits up; auxiliary weights as they are.
Means over entries and rows are sums over rows here (`noisy.py`).

Cost: B × C × d² for the projections above what `capro.py` costs, and Q × C × d² for the opinions.

Paper and code: see `capro.py` (NUS-WIDE, 81 concepts: γ = 0.9, Q = 2,048, NeurIPS 2023, arXiv 2310.09761).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from residency.adapt.bootstrapping import collective
from residency.adapt.capro import CLEAN, CAPro
from residency.adapt.classbank import ClassBank
from residency.adapt.noisy import Verdict, full
from residency.objective import Outputs


class CAProLabels(CAPro):
    """The loss above.

    Inputs: as `CAPro`, with `labels` [B, C] of 0 and 1; `clean` [B], or [B, C].

    Args:
        classes: C.
        width: D.
        model: See `NoisyLabels`.
        positives: w_c(1) [C]; 1 if None. `balance` computes it.
        more: Further arguments of `CAPro`.
    """

    positives: Tensor

    def __init__(
        self, classes: int, width: int, model: nn.Module | None = None, *, positives: Tensor | None = None, **more: Any
    ) -> None:
        super().__init__(classes, width, model, **({"relabel": 0.9} | more))
        d = self.auxiliary.in_features
        self.as_seen_by = nn.Parameter(torch.eye(d).repeat(classes, 1, 1) + torch.randn(classes, d, d) / (10 * d**0.5))
        self.shift = nn.Parameter(torch.zeros(classes, d))
        self.bank = ClassBank(2 * classes, d)
        self.register_buffer("positives", torch.ones(classes) if positives is None else positives.float())

    def seen(self, z: Tensor) -> Tensor:
        """z_c [B, C, d] of z [B, d]."""
        return nn.functional.normalize(torch.einsum("bd,cde->bce", z, self.as_seen_by) + self.shift, dim=-1)

    def by_pairs(self, seen: Tensor) -> Tensor:
        """Logits [B, C] of p_pos; 0 where a class lacks one of its prototypes."""
        c, known = self.bank.vectors.clone().view(self.classes, 2, -1), self.bank.known.view(self.classes, 2).all(1)
        return ((seen * (c[:, 1] - c[:, 0])).sum(-1) / self.temperature).masked_fill(~known, 0.0)

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, rows); queue and prototypes take the rows in."""
        phase, trusted = int(self.phase), self._spread(batch)
        u = self.unit(outputs)
        z = full(self.project(u))
        logits = full(self.classifier(u))
        given = batch["labels"].to(logits.dtype)
        seen = full(self.seen(z))
        total = self.contrasted(z, batch)
        if not phase:
            total = total + self.reconstruct * self.reconstruction(u, z).sum()
        pairs = self.by_pairs(seen)
        y, there = given, torch.ones_like(trusted)
        if phase >= CLEAN:
            scores = self.alpha * logits.detach().sigmoid() + (1 - self.alpha) * pairs.detach().sigmoid()
            y, there, _ = correct_entries(scores, given, self.relabel, self._floor(), trusted)
        self.traced(there.any(1), (y != given).any(1))
        binary = nn.functional.binary_cross_entropy_with_logits
        losses = binary(logits, y, pos_weight=self.positives, reduction="none")
        if phase:
            losses = losses + binary(pairs, y, reduction="none")
        votes = self._entry_votes(seen)
        losses = losses + (1 - self.beta) * binary(votes, y, reduction="none")
        if self.beta and len(self.queue):
            keys = self.queue.filled
            b = collective(z.detach(), keys, self.opinions(keys)).clamp(0, 1)
            soft = -b * nn.functional.logsigmoid(votes) if self.official else binary(votes, b, reduction="none")
            losses = losses + self.beta * soft
        total = total + losses.masked_fill(~there, 0.0).mean(1).sum()
        if self.training and phase:
            entry = 2 * torch.arange(self.classes, device=y.device) + y.long()
            self.bank.ema_(seen.detach()[there], entry[there], self.polish)
        return total, batch["rows"].new_tensor(len(given))

    @torch.no_grad()
    def opinions(self, keys: Tensor) -> Tensor:
        """Opinions o [Q, C] of keys [Q, d], each in [0, 1]."""
        seen = full(self.seen(keys))
        p = self._entry_votes(seen).sigmoid()
        if not self.official and not bool(self.bank.known.any()):
            return p
        return self.alpha * p + (1 - self.alpha) * self.by_pairs(seen).sigmoid()

    @torch.no_grad()
    def judge(self, features: Tensor, labels: Tensor, clean: Tensor) -> Verdict:
        """See `NoisyLabels.judge`; a row is relabelled where an entry is, and dropped where none is left."""
        u = self.unit(Outputs(features=features))
        z = full(self.project(u))
        p = full(self.classifier(u)).sigmoid()
        q = self.by_pairs(full(self.seen(z))).sigmoid() if bool(self.bank.known.any()) else p
        scores = self.alpha * p + (1 - self.alpha) * q
        clean = clean[:, None].expand_as(scores) if clean.dim() == 1 else clean
        y, there, moved = correct_entries(scores, labels.float(), self.relabel, self._floor(), clean)
        now = torch.where(there, y, -torch.ones_like(y)).long()
        return Verdict(now, there.any(1), moved.any(1), scores, p, q, None, z)

    # ------------------------------------------------------------------ parts

    def _floor(self) -> float:
        return 1 / self.classes if self.keep is None else self.keep

    def _spread(self, batch: dict[str, Any]) -> Tensor:
        """`clean` as [B, C]."""
        clean = self.trusted(batch)
        return clean[:, None].expand(-1, self.classes) if clean.dim() == 1 else clean

    def _entry_votes(self, seen: Tensor) -> Tensor:
        """Logits of the auxiliary classifiers [B, C], one weight vector per class on its own z_c."""
        w = self.auxiliary.weight
        if self.official:
            return full((seen * w).sum(-1))
        return full((seen * nn.functional.normalize(w, dim=-1)).sum(-1) / self.temperature)

    def _initialise(self, z: Tensor, labels: Tensor, clean: Tensor) -> None:
        """Both prototypes of every class: of trusted entries, and of all where there is none."""
        seen = full(self.seen(z))
        trusted = clean[:, None].expand(-1, self.classes) if clean.dim() == 1 else clean
        entry = 2 * torch.arange(self.classes, device=z.device) + labels.long()
        for rows in (torch.ones_like(trusted), trusted):
            self.bank.of_means(seen[rows], entry[rows])


def balance(labels: Tensor) -> Tensor:
    """w_c(1) = √((N − n_c) / n_c) [C] of multi-hot labels [N, C]; 1 for a label that no row or every row has."""
    n = labels.float().sum(0)
    return torch.where((n > 0) & (n < len(labels)), ((len(labels) - n) / n.clamp_min(1)).sqrt(), torch.ones_like(n))


def correct_entries(
    scores: Tensor, labels: Tensor, relabel: float, keep: float, protect: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rule above.

    Args:
        scores: s [N, C].
        labels: y [N, C] of 0 and 1.
        relabel: γ.
        keep: Score above which an entry stands.
        protect: [N, C] bool, trusted entries.

    Returns:
        ŷ [N, C], which entries count [N, C], and which were flipped [N, C].
    """
    own = torch.where(labels > 0.5, scores, 1 - scores)
    flipped = (1 - own > relabel) & ~protect
    there = protect | flipped | (own > keep)
    return torch.where(flipped, 1 - labels, labels), there, flipped
