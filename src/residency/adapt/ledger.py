"""What became of every row, and why: one line per row of what a method for noisy labels decided at its end.

Sources: the rules are FoPro's and CAPro's (see `correction.py`); to say them row by row is our choice. Cost: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from residency.adapt.noisy import Verdict

What = Literal["trusted", "kept", "relabelled", "dropped"]


@dataclass(frozen=True)
class Fate:
    """One row's.

    Args:
        id: Of the row.
        what: trusted rows are never changed; others are kept, relabelled or dropped.
        given: Its label.
        now: Its label at the end; empty where it was dropped.
        score: s of the given label.
        best: The class with the largest s.
        best_score: That s.
        classifier: The classifier's probability of the given label.
        prototypes: The prototypes' probability of it.
        relation: The learned metric's u of it, or None.
        why: A sentence.
    """

    id: str
    what: What
    given: str
    now: str
    score: float
    best: str
    best_score: float
    classifier: float
    prototypes: float
    relation: float | None
    why: str

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)


def ledger(
    verdict: Verdict,
    labels: Tensor,
    clean: Tensor,
    *,
    ids: Sequence[str],
    classes: Sequence[str],
    relabel: float,
    keep: float | None = None,
) -> list[Fate]:
    """The fates of N rows with one label each.

    Args:
        verdict: Of those rows.
        labels: As given [N].
        clean: [N] bool.
        ids: Of the rows.
        classes: Names.
        relabel: γ, for the sentence.
        keep: Score above which a label stands; 1/C if None.
    """
    floor = 1 / len(classes) if keep is None else keep
    at = labels[:, None]
    own, p, q = (t.gather(1, at)[:, 0].tolist() for t in (verdict.scores, verdict.classifier, verdict.prototypes))
    u = None if verdict.second is None else verdict.second.gather(1, at)[:, 0].tolist()
    best, guess = (t.tolist() for t in verdict.scores.max(1))
    held, moved, now = verdict.keep.tolist(), verdict.relabelled.tolist(), verdict.labels.tolist()
    found = []
    for i, (given, sure) in enumerate(zip(labels.tolist(), clean.tolist(), strict=True)):
        name, other = classes[given], classes[guess[i]]
        metric = None if u is None else u[i]
        what: What
        if sure:
            what, why = "trusted", "trusted: its label is not questioned"
        elif moved[i]:
            what = "relabelled"
            why = f"{other} has {best[i]:.2f}, above {relabel:g}; {name} has {own[i]:.2f}"
        elif not held[i]:
            what = "dropped"
            why = f"{name} has {own[i]:.2f}, not above {floor:.2g}; {other} has {best[i]:.2f}, not above {relabel:g}"
        elif metric is not None and metric > relabel:
            what, why = "kept", f"the learned metric finds it like {name}: {metric:.2f}, above {relabel:g}"
        elif guess[i] == given:
            what, why = "kept", f"{name} is also the best guess: {own[i]:.2f}"
        else:
            what, why = "kept", f"{name} has {own[i]:.2f}, above {floor:.2g}; {other} has only {best[i]:.2f}"
        found.append(
            Fate(
                ids[i],
                what,
                name,
                classes[now[i]] if what != "dropped" else "",
                round(own[i], 4),
                other,
                round(best[i], 4),
                round(p[i], 4),
                round(q[i], 4),
                None if metric is None else round(metric, 4),
                why,
            )
        )
    return found
