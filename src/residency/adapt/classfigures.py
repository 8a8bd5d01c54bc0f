"""Figures of classes and their means: how many rows, where they lie, how hard they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from residency.adapt.classbank import ClassBank
from residency.adapt.difficulty import difficulties
from residency.encoders import principal_plane

POINTS = 1500
"""Rows in a figure of rows."""


def difficulty(z: Tensor, y: Tensor, classes: int) -> Tensor:
    """DIF [N] of rows [N, D] of classes [N] by the rows' own class means."""
    bank = ClassBank(classes, z.shape[1], normalise=False).of_means(z, y)
    return difficulties(z, bank.vectors).gather(1, y[:, None])[:, 0]


def balance(classes: Sequence[str], sizes: list[int]) -> dict[str, Any]:
    """Rows per class."""
    return {
        "kind": "bars",
        "title": "Rows per class",
        "x": list(classes),
        "y": sizes,
        "xlabel": "class",
        "ylabel": "rows",
    }


def rows_and_means(title: str, z: Tensor, y: Tensor, classes: Sequence[str], ids: Sequence[str]) -> dict[str, Any]:
    """At most `POINTS` rows, evenly over their order, and the class means of all, on two principal components."""
    means = torch.nn.functional.normalize(
        ClassBank(len(classes), z.shape[1], normalise=False).of_means(z, y).vectors, dim=-1
    )
    some = torch.linspace(0, len(z) - 1, min(POINTS, len(z))).round().long()
    unit = torch.nn.functional.normalize(z[some], dim=-1)
    flat = principal_plane(torch.cat([unit, means]).numpy())
    return {
        "kind": "scatter",
        "title": title,
        "x": flat[:, 0].tolist(),
        "y": flat[:, 1].tolist(),
        "group": [classes[c] for c in y[some].tolist()] + ["class means"] * len(classes),
        "hover": [ids[i] for i in some.tolist()] + [f"mean of {c}" for c in classes],
        "xlabel": "first principal component",
        "ylabel": "second",
    }


def histogram(hard: Sequence[Tensor]) -> dict[str, Any]:
    """Shares of rows by difficulty, before and after."""
    top = max(float(h.max()) for h in hard)
    bins = 30
    middles = [round((i + 0.5) * top / bins, 4) for i in range(bins)]
    shares = [torch.histc(h, bins, 0.0, top) / len(h) for h in hard]
    names = ("before training", "after")
    return {
        "kind": "lines",
        "title": "How hard rows are: distance to their class mean, as a share of the distances to all",
        "xlabel": "difficulty",
        "ylabel": "share of rows",
        "series": [
            {"name": n, "x": middles, "y": [round(v, 4) for v in s.tolist()]}
            for n, s in zip(names, shares, strict=True)
        ],
    }


def curriculum(trace: Tensor) -> dict[str, Any]:
    """Mean difficulty at the start of every epoch, of all rows and of those it trained on.

    Args:
        trace: [E, 2], NaN for epochs there were not.
    """
    trace = trace[trace[:, 0].isfinite()].cpu()
    epochs = list(range(1, len(trace) + 1))
    return {
        "kind": "lines",
        "title": "What each epoch trained on",
        "xlabel": "epoch",
        "ylabel": "mean difficulty at its start",
        "series": [
            {"name": name, "x": epochs, "y": [round(v, 4) for v in trace[:, i].tolist()]}
            for i, name in enumerate(("all rows", "rows of the epoch"))
        ],
    }
