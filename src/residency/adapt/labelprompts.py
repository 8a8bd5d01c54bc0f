"""Label-guided prompts and prototypes: few-shot detection of the aspects a sentence speaks of, several at a time.

Every sentence is seen under every label (h_n(x), a unit vector; three forms, see `residency.prompted`), and what a
label means, a name and a description, guides its prototype. With K shots x_nk of label n and label vector e_n, the
encoder's unit vector of "name: description",

    w_nk = softmax_k(φ cos(h_n(x_nk), e_n)),      c_n = (1 − η) Σ_k w_nk h_n(x_nk) + η e_n
    z_qn = s (m − ‖h_n(q) − c_n‖²),               p_q = softmax_n(z_q)   or   p_qn = σ(z_qn)

    mse    L = Σ_qn (p_qn − y_qn)² with the softmax        bce    L = Σ_qn of −y log p − (1 − y) log(1 − p) with σ

over episodes: N labels drawn with K shots and Q queries each. The sums run over queries and labels of single episodes,
so they do not depend on how episodes are batched. φ = 0 weighs shots alike; η = φ = 0 with form "plain" is a
prototypical network. K = 1 makes φ irrelevant. The softmax lets several true labels share a mass of 1, so a threshold
on it belongs to an N; σ does not, and its threshold holds for any number of labels.

From the abstract of the paper: label prompts, descriptions by a language model, prototypes they guide. From its
neighbours' code (LDF): softmax of negative squared distance, squared error, thresholds 0.3 of five labels and 0.2 of
ten. Ours: the template, the pooling, unit vectors, φ, the mixing rule, binary cross-entropy, the attention form (one
pass per sentence instead of N), calibrated thresholds. Read as a reconstruction, not as the authors' model.

Sources: Guan, Zhu, Bai, Wang, "Label-Guided Prompt for Multi-label Few-shot Aspect Category Detection", 2024, arXiv
2407.20673, official code: none released; Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS
2017, arXiv 1703.05175; Zhao et al., "Label-Driven Denoising Framework for Multi-Label Few-Shot Aspect Category
Detection", Findings of EMNLP 2022, arXiv 2210.04220, code 1429904852/LDF, commit ee822da.
Cost per episode: N K + N Q encoder passes and N for the labels; for the prompt form N K + N² Q + N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from residency import multilabel
from residency.adapt.episodes import Episode, readable
from residency.adapt.labelpromptparams import TEMPLATE, LabelPrompts
from residency.labeltemplates import Marked, Prompter, collate_marked
from residency.objective import Objective, Outputs
from residency.prompted import LabelView, Link, probabilities

__all__ = [
    "SCALARS",
    "TEMPLATE",
    "EpisodeLoss",
    "LabelPrompts",
    "Task",
    "Tasks",
    "calibrated",
    "collate_tasks",
    "episode_loss",
    "fixed_threshold",
    "left_out_scores",
    "named",
    "prototypes",
]

SCALARS = {"log_scale": 100.0, "margin": 100.0, "sharpness": 100.0}
"""Factors on the learning rate for `train.fit`: three numbers of order 1 beside an encoder's weights (our choice)."""


def prototypes(shots: Tensor, labels: Tensor | None, eta: float, focus: float, there: Tensor | None = None) -> Tensor:
    """Label-guided prototypes of shots.

    Args:
        shots: h of the shots, [..., N, K, D].
        labels: e [..., N, D]; needed where η or φ is not 0.
        eta: η, the share of the label vector.
        focus: φ, the sharpness of the weights over shots.
        there: Which shots exist, bool [..., N, K]; all by default. A label without any has prototype e.

    Returns:
        [..., N, D].

    Raises:
        ValueError: When η or φ needs label vectors and there are none, or a label has neither shots nor a vector.
    """
    if labels is None and (eta or focus):
        raise ValueError("eta and focus guide prototypes by label vectors, and there are none")
    if there is None:
        there = torch.ones(shots.shape[:-1], dtype=torch.bool, device=shots.device)
    some = there.any(-1, keepdim=True)
    if labels is None and not bool(some.all()):
        raise ValueError("a label has no shots and no vector of its own: give rows of every label")
    unit = nn.functional.normalize
    near = torch.zeros_like(shots[..., 0])
    if labels is not None and focus:
        near = focus * (unit(shots, dim=-1) * unit(labels, dim=-1)[..., None, :]).sum(-1)
    weights = near.masked_fill(~there & some, -torch.inf).softmax(-1) * there  # [..., N, K]
    mean = (weights[..., None] * shots).sum(-2)
    if labels is None:
        return mean
    return torch.where(some, (1 - eta) * mean + eta * labels, labels)


@dataclass(frozen=True)
class Task:
    """An episode as tokens.

    Args:
        id: What errors call it.
        support: [N][K].
        query: [N · Q][N], or [N · Q][1] where the label is not in the text.
        named: [N] names and descriptions, or () where nothing reads them.
        target: [N · Q, N] bool.
    """

    id: str
    support: tuple[tuple[Marked, ...], ...]
    query: tuple[tuple[Marked, ...], ...]
    named: tuple[Marked, ...]
    target: np.ndarray

    def __len__(self) -> int:
        return sum(len(m) for part in (*self.support, *self.query, self.named) for m in part)


class Tasks:
    """Episodes → tasks; each (sentence, label) is tokenised once.

    Args:
        method: Form, template, what reads label vectors.
        tokenizer: The encoder's.
        texts: The rows' sentences.
        descriptions: Label → what it means; the readable name stands before it.
        max_tokens: Longest sequence.
    """

    def __init__(
        self,
        method: LabelPrompts,
        tokenizer: Any,
        texts: Sequence[str],
        descriptions: Mapping[str, str],
        max_tokens: int = 128,
    ) -> None:
        self.method, self.texts, self.descriptions = method, texts, descriptions
        self.prompter = method.prompter(tokenizer, max_tokens)
        self.namer = Prompter(tokenizer, max_tokens=max_tokens)
        self._seen: dict[tuple[int, str], Marked] = {}

    def marked(self, row: int, label: str) -> Marked:
        """A row's sentence under a label."""
        label = label if self.method.form == "prompt" else ""
        if (row, label) not in self._seen:
            self._seen[row, label] = self.prompter(self.texts[row], readable(label) if label else "")
        return self._seen[row, label]

    def named(self, label: str) -> Marked:
        """A label's name and description."""
        return self.namer(named(label, self.descriptions.get(label, "")))

    def __call__(self, episode: Episode, id: str = "an episode") -> Task:
        """One episode as tokens."""
        asked = episode.classes if self.method.form == "prompt" else episode.classes[:1]
        return Task(
            id,
            tuple(
                tuple(self.marked(i, c) for i in rows) for c, rows in zip(episode.classes, episode.support, strict=True)
            ),
            tuple(tuple(self.marked(i, c) for c in asked) for i in episode.query),
            tuple(self.named(c) for c in episode.classes) if self.method.names_labels else (),
            episode.target,
        )


def named(label: str, description: str = "") -> str:
    """The text of a label's vector: "name: description", or the name alone."""
    return f"{readable(label)}: {description}" if description.strip() else readable(label)


def collate_tasks(tasks: Sequence[Task], pad: int) -> dict[str, Any]:
    """What `LabelView` takes, and `labels` [E, N · Q, N] float; all tasks have one N, K and Q.

    Raises:
        ValueError: When they have not.
    """
    shapes = {(len(t.support), len(t.support[0]), len(t.query), len(t.query[0]), len(t.named)) for t in tasks}
    if len(shapes) != 1:
        raise ValueError(f"one batch needs tasks of one shape, got (N, K, queries, asked, named) {sorted(shapes)}")
    flat: list[Marked] = []

    def place(rows: Sequence[Sequence[Marked]]) -> list[list[int]]:
        at = []
        for row in rows:
            at.append(list(range(len(flat), len(flat) + len(row))))
            flat.extend(row)
        return at

    support = torch.tensor([place(t.support) for t in tasks])
    query = torch.tensor([place(t.query) for t in tasks])
    names = torch.tensor([place([t.named])[0] for t in tasks])
    target = torch.from_numpy(np.stack([t.target for t in tasks])).float()
    given: dict[str, Any] = {"support": support, "query": query, "labels": target}
    if names.numel():
        given["named"] = names
    return collate_marked(flat, pad) | given


def episode_loss(logits: Tensor, target: Tensor, loss: Literal["mse", "bce"]) -> Tensor:
    """Loss sum of z [..., N] against multi-hot targets of the same shape.

    Raises:
        ValueError: When the shapes differ.
    """
    if logits.shape != target.shape:
        raise ValueError(f"logits {[*logits.shape]} and targets {[*target.shape]} must have one shape")
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    target = target.to(logits.dtype)
    if loss == "mse":
        return (logits.softmax(-1) - target).square().sum()
    return nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")


class EpisodeLoss(Objective):
    """The loss of episodes; counts queries × labels.

    Args:
        view: The model that is trained (and is not part of the objective).
        method: Prototypes and loss.

    Inputs: batches of `collate_tasks`.
    """

    wants: ClassVar[Literal["nothing"]] = "nothing"

    def __init__(self, view: LabelView, method: LabelPrompts) -> None:
        super().__init__()
        object.__setattr__(self, "view", view)
        self.view: LabelView
        self.method = method

    def count(self, batch: dict[str, Any]) -> int:
        """Queries × labels."""
        return int(batch["labels"].numel())

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Z [E, N · Q, N]."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "pool", "support", "query")}
        shots, queries, e = self.view(**given, named=batch.get("named"))
        c = prototypes(shots, e, self.method.eta, self.method.focus)
        return self.view.logits(queries, c[:, None])

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See `Objective.forward`; `outputs` is empty."""
        z = self.logits(batch)
        return episode_loss(z, batch["labels"], self.method.loss), z.new_tensor(z.numel())


# ------------------------------------------------------------------ thresholds


def fixed_threshold(ways: int, link: Link) -> float:
    """LDF's thresholds, 0.3 of five labels and 0.2 of ten, on the power law through both; 0.5 for sigmoid scores."""
    return 0.5 if link == "sigmoid" else round(min(0.5, 0.3 * (5 / ways) ** np.log2(1.5)), 4)


def left_out_scores(
    view: LabelView,
    h: Tensor,
    labels: Tensor | None,
    gold: np.ndarray,
    method: LabelPrompts,
    only: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every row by prototypes made without it: what thresholds are calibrated on.

    Args:
        view: Scale and margin.
        h: [R, C or 1, D], rows under all labels.
        labels: e [C, D] or None.
        gold: bool [R, C].
        method: η, φ, link.
        only: Score the first so many rows; the others are shots that nobody checked.

    Returns:
        Scores [R', C], and which rows R' those are: a row that is some label's only one is left out unless label
        vectors stand in for it.
    """
    R, C = gold.shape
    shots = h.expand(R, C, -1).transpose(0, 1)  # [C, R, D]
    there = torch.from_numpy(gold.T.copy()).to(h.device)
    scores, kept = [], []
    for r in range(R if only is None else only):
        rest = there.clone()
        rest[:, r] = False
        if labels is None and not bool(rest.any(1).all()):
            continue
        c = prototypes(shots, labels, method.eta, method.focus, rest)
        scores.append(probabilities(view.logits(h[r], c), method.link).detach().cpu().numpy())
        kept.append(r)
    return np.array(scores, np.float32).reshape(len(kept), C), np.array(kept, int)


def calibrated(
    scores: np.ndarray, gold: np.ndarray, link: Link, *, least_one: bool = True
) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """The threshold of the best macro-F1 on held-out scores (the fixed one without any), and the curve."""
    if not len(scores):
        return fixed_threshold(gold.shape[1], link), (np.zeros(0), np.zeros(0))
    parts = [(scores, gold)]
    curve = multilabel.threshold_curve(parts, least_one=least_one)
    return multilabel.best_threshold(parts, least_one=least_one), curve
