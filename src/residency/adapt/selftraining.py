"""Self-training: what a classifier is sure of on unlabelled rows becomes training data, for a few rounds.

    f_0 = fit(labelled);        for r = 1 … R:   U_r = select(f_{r−1}(unlabelled)),   f_r = fit(labelled ∪ U_r)

Every round fits from scratch, on the given labels and the current pseudo-labels. A row is selected if it is in the best
share of the rows that are given its class, and only where its confidence reaches a threshold; a balance keeps easy
classes from crowding out the others. The default is the share, because a threshold alone takes what is easy: on digits,
from 60 labels, 0.8 took pseudo-labels of which 98 % were right and lost 6 points of accuracy; a share of 0.5 gained 5
(five seeds, logistic regression). By default a later round decides anew about every unlabelled row, so that an early
mistake can be taken back (our choice); `revise: false` keeps whatever was once added, as scikit-learn does.

Confidence is the largest score of a row. Where several labels may be true, each score p is held against the decision
threshold t, and a row is as sure as the least sure of its decisions:

    sure(p) = 1/2 + (p − t) / (2 (1 − t)) if p ≥ t,  else 1/2 + (t − p) / (2 t);        t = 1/2 gives max(p, 1 − p)

Rows that would be given no label are left alone: what they are about may be none of the classes.

It is a pure function of two callables, `fit` and `predict_proba`, so any classifier can have it as its last stage. It
does not know whether the model is right: where the truth of the unlabelled rows is known, every round says how many of
its pseudo-labels were.

Sources: Scudder, "Probability of error of some adaptive pattern-recognition machines", IEEE Trans. Inf. Theory 1965;
Lee, "Pseudo-Label", ICML workshop 2013; selection per class after Zou, Yu, Kumar, Wang, "Unsupervised Domain Adaptation
for Semantic Segmentation via Class-Balanced Self-Training", ECCV 2018, arXiv 1810.07911. As the last stage of the
MER2024-SEMI winner: Qi, Zhou et al., "Multimodal Emotion Recognition with Vision-language Prompting and Modality
Dropout", 2024, arXiv 2409.07078, whose threshold and rounds are unknown; official code: none released. Without shares
and balance and with `revise: false` it is scikit-learn's `SelfTrainingClassifier`, to which a test holds it equal.
Cost: R + 1 fits and R passes over the unlabelled rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import Field

from residency.errors import DataError
from residency.step import Params

Label = str | Collection[str]
"""One class, or a set of labels."""
Fit = Callable[[Sequence[Any], Sequence[Any]], Any]
PredictProba = Callable[[Any, Sequence[Any]], np.ndarray]


class SelfTraining(Params):
    """How to learn from one's own confident answers."""

    rounds: int = Field(1, ge=1, le=20)
    """How often pseudo-labels are drawn and the classifier is fitted again."""
    threshold: float = Field(0.0, ge=0, le=1)
    """Confidence from which a row may be taken; 0 leaves the choice to `share`."""
    share: float = Field(0.5, gt=0, le=1)
    """Of the rows given a class, only the most confident share may be taken; 1 leaves the choice to `threshold`."""
    balance: Literal["none", "equal", "labelled"] = "none"
    """As many new rows for each class that gets any, or in proportion to the labelled rows; none takes all."""
    revise: bool = True
    """Whether each round decides anew about all unlabelled rows; false keeps what was added."""


@dataclass(frozen=True)
class Round:
    """What one round did.

    Args:
        number: From 1.
        added: Rows that carry a pseudo-label now.
        of: Unlabelled rows.
        changed: Rows whose pseudo-label is new, another one or gone.
        per_class: Class → rows that carry it.
        confidence: Mean of the rows taken; None without any.
        right: Share of pseudo-labels (whole sets) that are the truth, where it is known; else None.
        known: On how many rows that share is counted.
    """

    number: int
    added: int
    of: int
    changed: int
    per_class: dict[str, int]
    confidence: float | None
    right: float | None
    known: int


@dataclass
class SelfTrained:
    """The result: the last model, the pseudo-label of every unlabelled row (None where it has none), the rounds."""

    model: Any
    labels: list[Any]
    rounds: list[Round] = field(default_factory=list)


def confidence(scores: np.ndarray, decide: float | None = None) -> np.ndarray:
    """How sure each row [N] of scores [N, C] is: its best class, or with `decide` its least sure decision."""
    if decide is None:
        return scores.max(1)
    above = 0.5 + (scores - decide) / (2 * (1 - decide)) if decide < 1 else np.ones_like(scores)
    below = 0.5 + (decide - scores) / (2 * decide) if decide > 0 else np.ones_like(scores)
    return np.where(scores >= decide, above, below).min(1)


def select(
    scores: np.ndarray,
    params: SelfTraining,
    *,
    decide: float | None = None,
    prior: np.ndarray | None = None,
) -> np.ndarray:
    """Which rows to take.

    Args:
        scores: [N, C].
        params: Threshold, share and balance.
        decide: Score from which a label counts as given, where several may be; None gives each row its best class.
        prior: Labelled rows per class [C], for balance "labelled".

    Returns:
        Indices, most confident first; ties in the order of the rows.
    """
    if not len(scores):
        return np.zeros(0, int)
    given = np.eye(scores.shape[1], dtype=bool)[scores.argmax(1)] if decide is None else scores >= decide
    sure = confidence(scores, decide)
    order = np.argsort(-sure, kind="stable")
    quota = np.ceil(params.share * given.sum(0) - 1e-9).astype(int)
    ok = [i for i in order if sure[i] >= params.threshold and given[i].any()]
    taken = _within(ok, given, quota)
    if params.balance == "none" or not taken:
        return np.array(taken, int)
    have = given[taken].sum(0)
    wish = np.ones(len(have)) if params.balance == "equal" or prior is None else np.asarray(prior, float)
    there = (have > 0) & (wish > 0)
    if not there.any():
        return np.zeros(0, int)
    # the largest numbers in the wished proportion that every class can give
    size = (have[there] / wish[there]).min()
    limit = np.where(there, np.maximum(1, np.floor(size * wish + 1e-9)), 0).astype(int)
    return np.array(_within(taken, given, np.minimum(limit, quota)), int)


def _within(order: Sequence[int], given: np.ndarray, quota: np.ndarray) -> list[int]:
    """Rows in order, each taken if none of its classes has its quota yet."""
    left, taken = quota.copy(), []
    for i in order:
        if (left[given[i]] > 0).all():
            left[given[i]] -= 1
            taken.append(int(i))
    return taken


def self_train(
    fit: Fit,
    predict_proba: PredictProba,
    labelled: Sequence[Any],
    labels: Sequence[Label],
    unlabelled: Sequence[Any],
    params: SelfTraining,
    *,
    classes: Sequence[str],
    decide: float | Callable[[Any], float] | None = None,
    truth: Sequence[Label | None] | None = None,
) -> SelfTrained:
    """Fit, and fit again with the confident answers on unlabelled rows.

    Args:
        fit: (items, labels) → model.
        predict_proba: (model, items) → scores [N, C], columns in the order of `classes`.
        labelled: Items whose labels are known.
        labels: Their class each, or their label sets if `decide` is given.
        unlabelled: Items without.
        params: Rounds and selection.
        classes: Of the scores.
        decide: Score from which a label is given (or a function of the model that says it); None for one class a row.
        truth: What the unlabelled rows really are, where it is known; only for the record.

    Raises:
        DataError: When there are no labelled rows, or scores are not finite.
        ValueError: When numbers of rows or classes do not match.
    """
    if len(labelled) != len(labels):
        raise ValueError(f"{len(labelled)} labelled rows, but {len(labels)} labels")
    if truth is not None and len(truth) != len(unlabelled):
        raise ValueError(f"{len(unlabelled)} unlabelled rows, but the truth of {len(truth)}")
    if not len(labelled):
        raise DataError("self-training starts from labelled rows, and there are none")
    counts = Counter(c for label in labels for c in _names(label))
    prior = np.array([counts[c] for c in classes])
    result = SelfTrained(fit(labelled, labels), [None] * len(unlabelled))
    if not len(unlabelled):
        return result
    for number in range(1, params.rounds + 1):
        at = decide(result.model) if callable(decide) else decide
        scores = np.asarray(predict_proba(result.model, unlabelled), np.float64)
        if scores.shape != (len(unlabelled), len(classes)):
            raise ValueError(f"scores {[*scores.shape]} for {len(unlabelled)} rows and {len(classes)} classes")
        if not np.isfinite(scores).all():
            raise DataError("the classifier's scores are not finite", where=f"round {number} of self-training")
        free = [i for i, old in enumerate(result.labels) if params.revise or old is None]
        new = [None] * len(unlabelled) if params.revise else list(result.labels)
        for k in select(scores[free], params, decide=at, prior=prior):
            new[free[k]] = _given(scores[free[k]], classes, at)
        changed = sum(a != b for a, b in zip(new, result.labels, strict=True))
        result.labels = new
        taken = [i for i, label in enumerate(new) if label is not None]
        result.rounds.append(_round(number, new, taken, changed, confidence(scores, at), truth))
        if not changed:
            break
        result.model = fit(
            [*labelled, *(unlabelled[i] for i in taken)],
            [*labels, *(new[i] for i in taken)],
        )
    return result


def _names(label: Label) -> frozenset[str]:
    return frozenset([label]) if isinstance(label, str) else frozenset(label)


def _given(scores: np.ndarray, classes: Sequence[str], decide: float | None) -> Any:
    if decide is None:
        return classes[int(scores.argmax())]
    return frozenset(c for c, s in zip(classes, scores, strict=True) if s >= decide)


def _round(
    number: int, new: list[Any], taken: list[int], changed: int, sure: np.ndarray, truth: Sequence[Label | None] | None
) -> Round:
    known = [(new[i], truth[i]) for i in taken if truth is not None and truth[i] is not None]
    right = [_names(said) == _names(true) for said, true in known if true is not None]
    return Round(
        number=number,
        added=len(taken),
        of=len(new),
        changed=changed,
        per_class=dict(sorted(Counter(c for i in taken for c in _names(new[i])).items())),
        confidence=round(float(sure[taken].mean()), 6) if taken else None,
        right=round(sum(right) / len(right), 6) if right else None,
        known=len(right),
    )


def rounds_figure(rounds: Sequence[Round]) -> dict[str, Any]:
    """What each round added and how right it was, as a table for the report."""
    return {
        "kind": "table",
        "title": "Self-training",
        "columns": ["round", "rows added", "of", "changed", "mean confidence", "right", "counted on"],
        "rows": [[r.number, r.added, r.of, r.changed, _shown(r.confidence), _shown(r.right), r.known] for r in rounds],
    }


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
