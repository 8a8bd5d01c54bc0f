"""SPCL: supervised contrast with prototypes, for classes of unequal size and small batches; emotions, first of all.

The idea. Supervised contrast draws rows of one class together, but in a small batch most rows of rare classes meet no
other of theirs. SPCL adds one prototype of every class to the candidates, the mean of K vectors drawn at random from a
queue of that class's latest M: every row has a positive, and the prototype moves a little from step to step, which
keeps the classes from collapsing. With g = (1 + cos) / 2 and the candidates A_i = (other rows of the batch, prototypes
T_1 … T_C), of which P_i are of the row's class:

    T_k = mean of K of the queue's vectors of class k;  the class mean m_k of the epoch's start while there are fewer
    L_i = −log( 1/|P_i| · Σ_{p ∈ P_i} e^{g(z_i, p)/τ} / Σ_{a ∈ A_i} e^{g(z_i, a)/τ} )

The batch joins the queues afterwards, detached: it never meets itself. A row is predicted to be of the class whose
*mean* is nearest. With one row per batch and the queues empty this is cross-entropy over g(z, m)/τ, a nearest-mean
classifier. A curriculum (`difficulty.py`) may choose half of the rows for each epoch, from easy to hard.

The paper's and the release's: all of the above; τ = 0.08, M = 512, K = 64. The release also trains a linear head on
detached features which predicts nothing: left out here.

`official` adds what its release does and its equations do not say: queues start anew every epoch, from the class means
(so a class with fewer than K rows in an epoch never uses its queue); a full queue forgets at random; rows whose loss is
below 0.3 are left out of the mean (a bound on a loss that depends on C and |P|). By default (our choice) queues live as
long as the training and forget the oldest, and all rows count. Of the release's forgetting this keeps the distribution
of what stays among older vectors, not the rare case that a new vector is forgotten at once.

The loss depends on who is in the batch: cutting an optimiser step otherwise is another loss. Each row is counted once
whatever the cut. The least a row can lose is log |P_i|, so curves of different batch sizes are not to be compared.

Cost: B × (B + C) similarities and the draw, C × M random numbers; C × M × D numbers of memory; before every epoch one
forward pass over all rows, for the means (a third of an epoch's training, two thirds of it when the curriculum halves
the epoch).

Paper: Song, Huang, Xue, Hu, "Supervised Prototypical Contrastive Learning for Emotion Recognition in Conversation",
EMNLP 2022, arXiv 2210.08713. Official code: github.com/caskcsg/SPCL, commit cd48939 (no licence; read for facts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from residency.adapt.classbank import ClassBank
from residency.adapt.contrast import multi_positive_nce, similarity
from residency.adapt.difficulty import choose, difficulties
from residency.adapt.queues import ClassQueue
from residency.objective import Look, Objective, Outputs

FLOOR = 0.3
"""Of the release: rows with a smaller loss are left out."""
TRACED = 256
"""Epochs whose mean difficulties are kept."""


class SPCL(Objective):
    """Supervised prototypical contrastive loss, with class means that predict.

    `begin_epoch` must have been called once before the first step: it sets the class means. `train.fit` does; a loop of
    your own calls `loss.begin_epoch(epoch, epochs, look)` with any callable that yields (Outputs(features=…), batch).

    Inputs: outputs.features [B, D], `labels` [B].

    Args:
        classes: C.
        width: D.
        temperature: τ.
        queue: M, vectors kept per class.
        support: K, vectors a prototype is the mean of.
        curriculum: "difficulty" takes half of the rows in every epoch, from easy to hard; "half" a random half, for a
            comparison at an equal number of steps (the release's training without curriculum); "none" all rows.
        official: See the module.

    Raises:
        ValueError: For fewer than two classes, K > M, or a curriculum of another name.
    """

    wants = "features"
    per_row = True
    trace: Tensor
    """[TRACED, 2] mean DIF of all rows, and of those chosen, at the start of every epoch; NaN where there was none."""

    def __init__(
        self,
        classes: int,
        width: int,
        temperature: float = 0.08,
        queue: int = 512,
        support: int = 64,
        curriculum: Literal["difficulty", "half", "none"] = "none",
        official: bool = False,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"a contrast between classes needs at least two, not {classes}")
        if not 1 <= support <= queue:
            raise ValueError(f"a prototype is the mean of 1 to {queue} vectors of the queue, not {support}")
        if curriculum not in ("difficulty", "half", "none"):
            raise ValueError(f"a curriculum is difficulty, half or none, not {curriculum!r}")
        self.temperature, self.support, self.curriculum, self.official = temperature, support, curriculum, official
        self.means = ClassBank(classes, width, normalise=False)
        self.queue = ClassQueue(classes, queue, width)
        self.register_buffer("trace", torch.full((TRACED, 2), torch.nan))

    def rows_per_epoch(self, rows: int) -> int:
        """Half of them, rounded up, unless there is no curriculum."""
        return rows if self.curriculum == "none" else -(-rows // 2)

    @torch.no_grad()
    def begin_epoch(self, epoch: int, epochs: int, look: Look) -> Sequence[int] | None:
        """Class means of all rows, difficulties, and the rows of the epoch."""
        z, y = seen(look)
        self.means.of_means(z, y)
        if self.official:
            self.queue.clear()
            here = self.means.known.nonzero()[:, 0]
            self.queue.push(self.means.vectors[here], here)
        own = self.difficulty(z, y)
        rows = torch.arange(len(y))
        if self.curriculum != "none":
            easy_to_hard = self.curriculum == "difficulty"
            rows = choose(own if easy_to_hard else torch.rand(len(y)), epoch / epochs if easy_to_hard else 0.5)
        if epoch < TRACED:
            self.trace[epoch] = torch.stack([own.mean(), own[rows.to(own.device)].mean()])
        return None if self.curriculum == "none" else rows.tolist()

    def difficulty(self, z: Tensor, y: Tensor) -> Tensor:
        """DIF [N] of rows [N, D] of classes [N], by the present class means."""
        z = z.to(self.means.vectors.dtype)
        return difficulties(z, self.means.vectors, self.means.known).gather(1, y[:, None])[:, 0]

    def prototypes(self) -> Tensor:
        """[C, D]: a fresh draw from the queues, the class mean where a queue holds fewer than K."""
        drawn, enough = self.queue.draw(self.support)
        return torch.where(enough[:, None], drawn, self.means.vectors)

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, rows), and take the rows into the queues."""
        assert outputs.features is not None
        z, y = outputs.features, batch["labels"]
        known = self.means.known
        if not bool(known.any()):
            raise ValueError("SPCL has no class means yet: call begin_epoch(epoch, epochs, look) before the first step")
        prototypes = self.prototypes()
        if self.training:
            if self.official:
                self._forget_at_random()
            self.queue.push(z, y)
        losses = spcl(z, y, prototypes.to(z.dtype), self.temperature, known)
        if self.official:
            kept = losses > FLOOR
            losses = losses * kept * (len(y) / kept.sum().clamp_min(1))  # divided by B, their mean
        return losses.sum(), y.new_tensor(len(y))

    @torch.no_grad()
    def predict(self, z: Tensor) -> Tensor:
        """The class of the nearest mean [N], of rows [N, D]."""
        return self.means.logits(z, 1.0).argmax(-1)

    def _forget_at_random(self) -> None:
        """Shuffle full queues, so that what is written over next is anyone's."""
        classes, size, width = self.queue.vectors.shape
        full = self.queue.count == size
        order = torch.rand(classes, size, device=full.device).argsort(1)[..., None].expand(-1, -1, width)
        shuffled = self.queue.vectors.gather(1, order)
        self.queue.vectors.copy_(torch.where(full[:, None, None], shuffled, self.queue.vectors))


def spcl(z: Tensor, y: Tensor, prototypes: Tensor, temperature: float, known: Tensor | None = None) -> Tensor:
    """The loss of every row against the other rows of its batch and the prototypes.

    Args:
        z: [B, D]; gets a gradient as anchor and as candidate.
        y: [B] classes.
        prototypes: T [C, D].
        temperature: τ.
        known: [C] bool, classes that have a prototype; all if None.

    Returns:
        [B] losses L_i, in at least float32.
    """
    classes = len(prototypes)
    every = torch.arange(classes, device=y.device)
    candidates = torch.cat([z, prototypes])
    positive = y[:, None] == torch.cat([y, every])[None]
    exclude = torch.eye(len(y), len(y) + classes, dtype=torch.bool, device=y.device)
    if known is not None:
        exclude[:, len(y) :] |= ~known
    sim = similarity(z, candidates, "halfcos")
    return multi_positive_nce(sim, positive, tau=temperature, exclude=exclude)


def seen(look: Look) -> tuple[Tensor, Tensor]:
    """All rows as the model sees them now: features [N, D] and labels [N]."""
    z, y = [], []
    for outputs, batch in look():
        assert outputs.features is not None
        z.append(outputs.features.detach())
        y.append(batch["labels"])
    return torch.cat(z), torch.cat(y)
