"""What FoPro and CAPro share: projected features, two classifiers, prototypes, a queue of keys, phases, a verdict.

    u = √D v / ‖v‖,  p = softmax(W u)                              the classifier that is kept, on encoder features v
    z = P(u) / ‖P(u)‖,  P = linear, ReLU, linear                  the space of prototypes c_k and keys z'
    q = cosines of z and the auxiliary weights / τ                 the auxiliary classifier, on z
    L_rec = ‖R(z) − u‖² / D                                       R mirrors P; teaches P before there are prototypes
    L_ins = −log e^{z·z'/τ} / (e^{z·z'/τ} + Σ_Q e^{z·z'_j/τ})       z' of another view, by the momentum copy

Features are brought to length √D (our choice, as `linear.LinearLoss` does), so that the classifier also fits vectors
saved at length 1. Keys of the row itself, from earlier epochs, are not negatives (our choice: the papers' queues are
short against their data, and ours are not). After the first phase R would learn alone, on detached z, with nobody
reading it, so L_rec ends there (the releases keep it up for DDP's sake). The auxiliary weights are unit vectors, which
the releases want and miss: their normalisation rebinds a local name.

Phases begin at shares of the training: epoch e of E is in the latest phase whose share s has s E ≤ e. The first has no
prototypes; "prototypes" starts with the means of trusted rows (a class without any takes all its rows, the papers'
K = 0); "clean" begins to relabel and drop; further ones are the methods'.

Losses are sums over rows, divided by the rows of the step: a dropped row counts as 0 (our choice: the releases divide
by the rows kept, which makes a loss depend on how a step is cut into batches). What still depends on the cut: queue,
prototypes and densities move batch by batch.

Papers: Qin et al., FoPro, AAAI 2023, arXiv 2212.00465; Qin et al., CAPro, NeurIPS 2023, arXiv 2310.09761; both build on
Li, Xiong, Hoi, "MoPro", ICLR 2021, arXiv 2009.07995.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residency.adapt.classbank import ClassBank
from residency.adapt.momentum import Momentum, inputs, strong_inputs
from residency.adapt.queues import RingQueue
from residency.objective import Look, Objective, Outputs

TRACED = 256
"""Epochs of whose rows it is kept how many were kept, relabelled and dropped."""


@dataclass(frozen=True)
class Verdict:
    """What a method thinks of N rows.

    Args:
        labels: [N] as they now are (or [N, C], −1 where an entry is left out).
        keep: [N] bool.
        relabelled: [N] bool.
        scores: s [N, C], by which it was decided.
        classifier: p [N, C].
        prototypes: [N, C] probabilities by prototypes; p where there are none yet.
        second: u [N, C] of FoPro's learned metric, or None.
        z: [N, d].
    """

    labels: Tensor
    keep: Tensor
    relabelled: Tensor
    scores: Tensor
    classifier: Tensor
    prototypes: Tensor
    second: Tensor | None
    z: Tensor


class NoisyLabels(Objective):
    """The shared part; FoPro and CAPro define `forward` and `judge`.

    Args:
        classes: C.
        width: D, of the encoder.
        model: The model that is trained, which the momentum copy follows; None for no copy and no instance loss.
        starts: Shares of the training at which phases begin, rising.
        project: d.
        middle: Units between D and d (the papers' 2,048).
        queue: Q.
        temperature: τ.
        alpha: α, weight of the classifier against the prototypes.
        relabel: γ.
        keep: Score above which a given label stands; 1/C if None.
        momentum: m of the copy.
        polish: m of the prototypes.
        instance: Weight of L_ins; 0 saves the copy's forward pass.
        reconstruct: Weight of L_rec.
        official: Do what the release does where it departs from its equations.

    Raises:
        ValueError: For values outside their ranges.
    """

    wants = "features"
    per_row = True
    phase: Tensor
    epoch: Tensor
    trace: Tensor
    """[TRACED, 3] rows of an epoch kept with their label, relabelled, dropped."""

    def __init__(
        self,
        classes: int,
        width: int,
        model: nn.Module | None = None,
        *,
        starts: Sequence[float],
        project: int = 128,
        middle: int = 256,
        queue: int = 4096,
        temperature: float = 0.1,
        alpha: float = 0.5,
        relabel: float = 0.6,
        keep: float | None = None,
        momentum: float = 0.999,
        polish: float = 0.999,
        instance: float = 1.0,
        reconstruct: float = 1.0,
        official: bool = False,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"noise in labels needs at least two classes, not {classes}")
        if not 0 <= alpha <= 1 or not 0 < relabel <= 1 or temperature <= 0:
            raise ValueError(f"α in [0, 1], γ in (0, 1] and τ > 0, not {alpha}, {relabel}, {temperature}")
        if list(starts) != sorted(starts) or not all(0 <= s <= 1 for s in starts):
            raise ValueError(f"phases begin at rising shares of the training, not {list(starts)}")
        self.classes, self.starts = classes, tuple(starts)
        self.temperature, self.alpha, self.relabel, self.keep = temperature, alpha, relabel, keep
        self.polish, self.instance, self.reconstruct, self.official = polish, instance, reconstruct, official
        self.classifier = nn.Linear(width, classes, bias=False)
        self.projector = nn.Sequential(nn.Linear(width, middle), nn.ReLU(), nn.Linear(middle, project))
        self.reconstructor = nn.Sequential(nn.Linear(project, middle), nn.ReLU(), nn.Linear(middle, width))
        self.auxiliary = nn.Linear(project, classes, bias=False)
        self.bank = ClassBank(classes, project)
        self.queue = RingQueue(queue, project, payload=1)
        self.momentum: Momentum | None = None if model is None else Momentum(model, momentum, constant=official)
        self.register_buffer("phase", torch.tensor(0))
        self.register_buffer("epoch", torch.tensor(0))
        self.register_buffer("trace", torch.zeros(TRACED, 3))

    # ------------------------------------------------------------------ the loop's calls

    def begin_step(self, step: int, steps: int) -> None:
        """The momentum copy follows the model."""
        if self.momentum is not None:
            self.momentum.follow(step)

    @torch.no_grad()
    def begin_epoch(self, epoch: int, epochs: int, look: Look) -> Sequence[int] | None:
        """Find the phase; at the first with prototypes, set them from all rows as they now are."""
        phase = sum(epoch >= start * epochs - 1e-9 for start in self.starts)
        self.phase.fill_(phase)
        self.epoch.fill_(epoch)
        if phase and not bool(self._known().any()):
            z, labels, clean = [], [], []
            for outputs, batch in look():
                z.append(full(self.project(self.unit(outputs))))
                labels.append(batch["labels"])
                clean.append(self.trusted(batch))
            self._initialise(torch.cat(z), torch.cat(labels), torch.cat(clean))
        return None

    def _known(self) -> Tensor:
        return self.bank.known

    def _initialise(self, z: Tensor, labels: Tensor, clean: Tensor) -> None:
        """Prototypes from trusted rows, and from all rows of a class that has none."""
        self.bank.of_means(z, labels)
        self.bank.of_means(z[clean], labels[clean])

    # ------------------------------------------------------------------ parts of the losses

    def unit(self, outputs: Outputs) -> Tensor:
        """Scaled features u [B, D]."""
        assert outputs.features is not None
        v = outputs.features.to(self.classifier.weight.dtype)
        return nn.functional.normalize(v, dim=-1) * v.shape[-1] ** 0.5

    def project(self, u: Tensor) -> Tensor:
        """Projections z [B, d]."""
        return nn.functional.normalize(self.projector(u), dim=-1)

    def vote(self, z: Tensor) -> Tensor:
        """Cosines of z [B, d] and the auxiliary weights [B, C]."""
        w = self.auxiliary.weight
        return products(z, w if self.official else nn.functional.normalize(w, dim=-1))

    @torch.no_grad()
    def keys(self, batch: dict[str, Any], strong: bool = True) -> Tensor:
        """Keys z' [B, d] of the other view, or of the rows as they are, by the momentum copy."""
        assert self.momentum is not None
        given = strong_inputs(batch) if strong else inputs(batch)
        return full(self.project(self.unit(Outputs(features=self.momentum(given)))))

    def instances(self, z: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
        """L_ins [B] against the queue as it is; 0 while the queue is empty."""
        if not len(self.queue):
            return z.sum(-1) * 0
        own = self.queue.filled_payloads[:, 0] == rows[:, None].to(self.queue.payloads.dtype)
        positive = (z * keys).sum(-1) / self.temperature
        return torch.logaddexp(positive, log_sum_exp(z, self.queue.filled, self.temperature, own)) - positive

    def reconstruction(self, u: Tensor, z: Tensor) -> Tensor:
        """L_rec [B]; u is not moved by it."""
        return (self.reconstructor(z) - u.detach()).square().mean(-1)

    @staticmethod
    def trusted(batch: dict[str, Any]) -> Tensor:
        """[B] bool."""
        clean = batch.get("clean")
        return (
            torch.zeros(len(batch["labels"]), dtype=torch.bool, device=batch["labels"].device)
            if clean is None
            else clean
        )

    def traced(self, keep: Tensor, relabelled: Tensor) -> None:
        """Count what became of a batch's rows."""
        if self.training and int(self.epoch) < TRACED:
            moved = relabelled & keep
            self.trace[int(self.epoch)] += torch.stack([(keep & ~moved).sum(), moved.sum(), (~keep).sum()])

    # ------------------------------------------------------------------ afterwards

    def judge(self, features: Tensor, labels: Tensor, clean: Tensor) -> Verdict:
        """What becomes of rows now, by the rule of the phase that was reached.

        Args:
            features: [N, D].
            labels: As given, [N] (or [N, C]).
            clean: [N] bool (or [N, C]).
        """
        raise NotImplementedError("abstract: the rule")

    def class_head(self) -> tuple[Tensor, Tensor]:
        """Weight [C, D] and bias [C] of the classifier for features of length 1."""
        weight = self.classifier.weight.detach().float().cpu()
        return weight * self.classifier.in_features**0.5, torch.zeros(self.classes)


def log_sum_exp(z: Tensor, keys: Tensor, temperature: float, exclude: Tensor) -> Tensor:
    """[B] log Σ_j e^{z · z'_j / τ} over keys [Q, d] not excluded [B, Q]; −inf where all are.

    Its gradient for z, Σ_j softmax_j z'_j / τ, is computed here and now, so that the graph neither holds [B, Q] nor
    the queue, which the batch is about to write over.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        logits = (z @ keys.T).div_(temperature).masked_fill_(exclude, -torch.inf)
        value = logits.logsumexp(-1)
        some = value.isfinite()
        slope = (logits - value.masked_fill(~some, 0.0)[:, None]).exp_() @ keys / temperature
    return value + ((z - z.detach()) * slope).sum(-1).masked_fill(~some, 0.0)


def products(a: Tensor, b: Tensor) -> Tensor:
    """[A, B] dot products of [A, d] and [B, d] in at least float32: divided by τ, a cosine of 8 bits is too coarse."""
    with torch.autocast(a.device.type, enabled=False):
        return full(a) @ full(b).T


def full(t: Tensor) -> Tensor:
    """In at least float32."""
    return t.float() if t.dtype.itemsize < 4 else t
