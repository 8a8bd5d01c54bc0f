"""From a trained view and a few rows per label to a classifier of label sets: prototypes, threshold, self-training.

The vectors h of the rows under every label are computed once. Prototypes are weighted means of them, so scoring each
row by prototypes made without it costs no encoder pass; on these scores the threshold of the best macro-F1 is chosen,
and the confusion is counted. Self-training computes h of the unlabelled rows once as well, and every round is a mean:
here a further fit is new prototypes, not a new encoder.

Leave-one-out of prototypes is our choice for the threshold, which the paper leaves open (Guan, Zhu, Bai, Wang, 2024,
arXiv 2407.20673); equations in `labelprompts`. Cost: one encoder pass per row (C per row for prompts) and O(R · C · R ·
D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from residency import multilabel
from residency.adapt.episodes import readable
from residency.adapt.labelpromptparams import LabelPrompts
from residency.adapt.labelprompts import calibrated, left_out_scores, named, prototypes
from residency.adapt.selftraining import SelfTrained, SelfTraining, self_train
from residency.errors import DataError
from residency.labeltemplates import Prompter
from residency.progress import Progress
from residency.prompted import Head, LabelView, PromptedClassifier, probabilities


@dataclass
class Fitted:
    """A classifier and what it was calibrated on.

    Args:
        classifier: Ready to predict or save.
        method: How it was made.
        h: [R, C or 1, D], the rows under all labels.
        gold: bool [R, C].
        scores, kept: Held-out scores [R', C] and which rows R' they are of.
        curve: Thresholds and the macro-F1 of each on these scores.
        named: Label → the text of its vector.
    """

    classifier: PromptedClassifier
    method: LabelPrompts
    h: Tensor
    gold: np.ndarray
    scores: np.ndarray
    kept: np.ndarray
    curve: tuple[np.ndarray, np.ndarray]
    named: dict[str, str]

    @property
    def checked(self) -> np.ndarray:
        """The truth of the held-out scores, bool [R', C]."""
        return self.gold[self.kept]

    @property
    def said(self) -> np.ndarray:
        """Decisions on the held-out scores, bool [R', C]."""
        head = self.classifier.head
        return multilabel.decide(self.scores, head.threshold, least_one=head.least_one)


def fit(
    view: LabelView,
    tokenizer: Any,
    method: LabelPrompts,
    texts: Sequence[str],
    labels: Sequence[Sequence[str]],
    *,
    classes: Sequence[str],
    descriptions: Mapping[str, str] | None = None,
    decide: float | None = None,
    max_tokens: int = 128,
    progress: Progress | None = None,
) -> Fitted:
    """Prototypes and threshold from rows.

    Args:
        view: Encoder and scalars, trained or not.
        tokenizer: The encoder's.
        method: Form, η, φ.
        texts: The rows, R of them.
        labels: Their label sets; each label of `classes` on at least one row.
        classes: The labels to predict.
        descriptions: Label → what it means.
        decide: The threshold; None calibrates it.
        max_tokens: Longest sequence.
        progress: Where progress goes.

    Raises:
        DataError: When a label has no rows, or there are none.
    """
    if not texts or len(texts) != len(labels):
        raise DataError(f"prototypes need rows with labels, got {len(texts)} texts and {len(labels)} label sets")
    gold = multilabel.multi_hot(labels, classes)
    if missing := [c for c, found in zip(classes, gold.sum(0), strict=True) if not found]:
        raise DataError(f"no row has the label `{missing[0]}`", hint="give at least one row of every label")
    view.eval()
    called = {c: named(c, (descriptions or {}).get(c, "")) for c in classes}
    namer = Prompter(tokenizer, max_tokens=max_tokens)
    pad = tokenizer.pad_token_id or 0
    plain = LabelView(view.encoder, "plain")
    e = torch.cat([*plain.vectors([namer(called[c]) for c in classes], pad)])[:, 0]
    prompter = method.prompter(tokenizer, max_tokens)
    head = Head(
        list(classes),
        {c: readable(c) for c in classes},
        torch.zeros_like(e),
        e,
        0.5,
        template=prompter.template,
        pool=prompter.pool,
        max_tokens=max_tokens,
        link=method.link,
        least_one=all(len(found) > 0 for found in labels),
    )
    classifier = PromptedClassifier(view, tokenizer, head)
    h = _seen(classifier, texts, progress)
    return _calibrate(Fitted(classifier, method, h, gold, *_NOTHING, called), gold, h, None, decide)


_NOTHING: tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]] = (
    np.zeros((0, 0)),
    np.zeros(0, int),
    (np.zeros(0), np.zeros(0)),
)


def _seen(classifier: PromptedClassifier, texts: Sequence[str], progress: Progress | None) -> Tensor:
    found = []
    with (progress or Progress()).task("reading rows under their labels", len(texts)) as advance:
        for h in classifier.seen(texts):
            found.append(h)
            advance(len(h))
    return torch.cat(found)


def _guides(fitted: Fitted) -> Tensor | None:
    """Label vectors, where η or φ reads them."""
    return fitted.classifier.head.labels if fitted.method.eta or fitted.method.focus else None


def _prototypes(fitted: Fitted, h: Tensor, gold: np.ndarray) -> Tensor:
    shots = h.expand(len(gold), gold.shape[1], -1).transpose(0, 1)
    there = torch.from_numpy(gold.T.copy()).to(h.device)
    with torch.no_grad():
        return prototypes(shots, _guides(fitted), fitted.method.eta, fitted.method.focus, there)


def _calibrate(fitted: Fitted, gold: np.ndarray, h: Tensor, only: int | None, decide: float | None) -> Fitted:
    """Prototypes of all rows; threshold and confusion on the first `only`, each left out in turn."""
    head = fitted.classifier.head
    head.prototypes = _prototypes(fitted, h, gold)
    scores, kept = left_out_scores(fitted.classifier.view, h, _guides(fitted), gold, fitted.method, only)
    threshold, curve = calibrated(scores, gold[kept], fitted.method.link, least_one=head.least_one)
    head.threshold = threshold if decide is None else decide
    return replace(fitted, scores=scores, kept=kept, curve=curve)


def self_trained(
    fitted: Fitted,
    params: SelfTraining,
    texts: Sequence[str],
    *,
    truth: Sequence[Sequence[str] | None] | None = None,
    decide: float | None = None,
    progress: Progress | None = None,
) -> tuple[Fitted, SelfTrained]:
    """Let confident answers on further texts become shots.

    Args:
        fitted: What `fit` returned.
        params: Rounds and selection.
        texts: Unlabelled.
        truth: Their label sets where they are known, for the record only.
        decide: The threshold; None calibrates it again, on the labelled rows.
        progress: Where progress goes.

    Returns:
        The new classifier, and the record.
    """
    head, R = fitted.classifier.head, len(fitted.gold)
    h = torch.cat([fitted.h, _seen(fitted.classifier, texts, progress)]) if texts else fitted.h
    classes = head.classes
    names = [frozenset(c for c, y in zip(classes, row, strict=True) if y) for row in fitted.gold]

    def refit(items: Sequence[int], labels: Sequence[Any]) -> Tensor:
        return _prototypes(fitted, h[list(items)], multilabel.multi_hot(labels, classes))

    def score(c: Tensor, items: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return probabilities(fitted.classifier.view.logits(h[list(items)], c), head.link).cpu().numpy()

    result = self_train(
        refit,
        score,
        range(R),
        names,
        range(R, R + len(texts)),
        params,
        classes=classes,
        decide=head.threshold,
        truth=truth,
    )
    extra = [(i, label) for i, label in zip(range(R, R + len(texts)), result.labels, strict=True) if label is not None]
    rows = [*range(R), *(i for i, _ in extra)]
    gold = np.concatenate([fitted.gold, multilabel.multi_hot([label for _, label in extra], classes)])
    classifier = PromptedClassifier(fitted.classifier.view, fitted.classifier.tokenizer, replace(head))
    return _calibrate(replace(fitted, classifier=classifier), gold, h[rows], R, decide), result
