"""Figures of a training on noisy labels: what became of rows and why, where they lie, how sure is how right.

Sources: our choices; reliability after Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv
1706.04599. Cost: none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from residency.adapt.ledger import Fate
from residency.encoders import principal_plane
from residency.rows import Row

PICTURES = 24
"""In a gallery."""
POINTS = 1500
"""Rows in a map."""
BINS = 10


def epochs(trace: Tensor) -> dict[str, Any]:
    """What every epoch did with its rows.

    Args:
        trace: [E, 3], see `NoisyLabels.trace`.
    """
    trace = trace[trace.sum(1) > 0].cpu()
    shares = trace / trace.sum(1, keepdim=True)
    x = list(range(1, len(trace) + 1))
    return {
        "kind": "lines",
        "title": "What every epoch did with its rows",
        "xlabel": "epoch",
        "ylabel": "share of rows",
        "series": [
            {"name": name, "x": x, "y": [round(v, 4) for v in shares[:, i].tolist()]}
            for i, name in enumerate(("kept with their label", "relabelled", "left out"))
        ],
    }


def plane(
    title: str, z: Tensor, prototypes: Tensor, labels: Sequence[str], classes: Sequence[str], ids: Sequence[str]
) -> dict[str, Any]:
    """At most `POINTS` rows [N, d], evenly over their order, and the prototypes [C, d], on two principal components."""
    some = torch.linspace(0, len(z) - 1, min(POINTS, len(z))).round().long()
    here = prototypes.norm(dim=-1) > 0
    flat = principal_plane(torch.cat([z[some], prototypes[here]]).float().cpu().numpy())
    return {
        "kind": "scatter",
        "title": title,
        "x": flat[:, 0].tolist(),
        "y": flat[:, 1].tolist(),
        "group": [labels[i] for i in some.tolist()] + ["prototypes"] * int(here.sum()),
        "hover": [ids[i] for i in some.tolist()]
        + [f"prototype of {c}" for c, there in zip(classes, here.tolist(), strict=True) if there],
        "xlabel": "first principal component",
        "ylabel": "second",
    }


def changes(fates: Sequence[Fate], classes: Sequence[str]) -> dict[str, Any]:
    """Given labels against what became of them."""
    columns = [*classes, "dropped"]
    counts = Counter((f.given, f.now or "dropped") for f in fates if f.what != "trusted")
    return {
        "kind": "heatmap",
        "title": "Given labels, and what became of them",
        "x": columns,
        "y": list(classes),
        "z": [[float(counts[given, now]) for now in columns] for given in classes],
        "xlabel": "label at the end",
        "ylabel": "label as given",
    }


def examples(fates: Sequence[Fate], rows: Sequence[Row]) -> dict[str, Any]:
    """The surest of the rows that were relabelled or dropped, of every pair of labels in turn: pictures, or texts."""
    moved = _mixed(fates, sorted(_are(fates, "relabelled"), key=lambda i: -fates[i].best_score))
    gone = _mixed(fates, sorted(_are(fates, "dropped"), key=lambda i: fates[i].score))
    half = PICTURES // 2
    shown = [*moved[: max(half, PICTURES - len(gone))], *gone[: max(half, PICTURES - len(moved))]][:PICTURES]
    title = "What was relabelled or dropped, and why"
    note = f"{len(moved):,} rows were relabelled and {len(gone):,} dropped; the surest of each pair of labels."
    if not all(rows[i].image is not None for i in shown):
        body = [[f.id, f.given, f.now or "dropped", rows[i].prompt[:120], f.why] for i in shown for f in (fates[i],)]
        columns = ["row", "given", "now", "text", "why"]
        return {"kind": "table", "title": title, "columns": columns, "rows": body, "note": note}
    from residency.images import thumbnail

    items = []
    for i in shown:
        f, row = fates[i], rows[i]
        about = [part for part in (row.tag, f"“{row.text[:80]}”" if row.text else None, f.why) if part]
        now = f"{f.given} → {f.now}" if f.now else f"{f.given}, dropped"
        items.append({"image": thumbnail(row.image or ""), "title": now, "text": " · ".join(about)})
    return {"kind": "gallery", "title": title, "items": items, "note": note}


def _are(fates: Sequence[Fate], what: str) -> list[int]:
    return [i for i, f in enumerate(fates) if f.what == what]


def _mixed(fates: Sequence[Fate], order: Sequence[int]) -> list[int]:
    """The first of every (given, now), then the second of each, and so on."""
    seen: Counter[tuple[str, str]] = Counter()
    turns: list[tuple[int, int, int]] = []
    for i in order:
        pair = (fates[i].given, fates[i].now)
        turns.append((seen[pair], len(turns), i))
        seen[pair] += 1
    return [i for *_, i in sorted(turns)]


def reliability(classifier: Tensor, fates: Sequence[Fate], classes: Sequence[str]) -> dict[str, Any]:
    """How often the classifier's best guess is a row's label, by how sure it is: as given, and at the end.

    Args:
        classifier: p [N, C].
        fates: Of the same rows; trusted ones are left out.
        classes: Names.
    """
    sure, guess = classifier.max(1)
    bins = (sure * BINS).long().clamp_max(BINS - 1).tolist()
    series = []
    for name, said in (("as given", lambda f: f.given), ("at the end, of rows kept", lambda f: f.now)):
        right: list[list[float]] = [[] for _ in range(BINS)]
        for b, g, f in zip(bins, guess.tolist(), fates, strict=True):
            if f.what != "trusted" and said(f):
                right[b].append(float(classes[g] == said(f)))
        x = [round((b + 0.5) / BINS, 3) for b in range(BINS)]
        series.append({"name": name, "x": x, "y": [round(sum(r) / len(r), 4) if r else None for r in right]})
    series.append({"name": "as sure as it is right", "x": [0.0, 1.0], "y": [0.0, 1.0]})
    return {
        "kind": "lines",
        "title": "How sure the classifier is, and how often noisy rows carry the label it says",
        "xlabel": "probability of its best guess",
        "ylabel": "share of rows with that label",
        "series": series,
        "note": "Labels as given are wrong at times, so their line ends below 1 even for a perfect classifier.",
    }
