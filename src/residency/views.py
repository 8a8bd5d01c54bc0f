"""Labelled rows as cached feature views, for training on top of a frozen encoder.

A frozen encoder sees every row a few times, as it is (view 0) and changed at random (the other views: crops, flips,
colours, dropped words), and never again. What is trained afterwards, an `Adapter` and a method's own layers, works on
these vectors, so that a method which needs two views per step costs what a small network costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Item:
    """One row.

    Args:
        index: Its place among the items; what the objective knows it by.
        id: Of the row.
        label: Class index as given, or its row of the multi-hot matrix as a tensor [C].
        features: [V, D], view 0 unchanged.
        clean: Whether its label is trusted.
    """

    index: int
    id: str
    label: int | Tensor
    features: Tensor
    clean: bool = False

    def __len__(self) -> int:
        return 1


def collate_views(items: Sequence[Item]) -> dict[str, Any]:
    """A batch: view 0, and for `strong` one of the others at random (view 0 again where there is no other).

    Which one is a function of who is in the batch and in what order, hence another one every epoch, and the same one
    when a training is resumed: loaders collate a batch ahead, so the global random state would not do.

    Returns:
        `features` and `strong` [B, D], `labels` [B] (or [B, C]), `rows` [B], `clean` [B] bool.
    """
    views = [len(item.features) for item in items]
    generator = generator_of([item.index for item in items])
    drawn = [int(torch.randint(1, n, (), generator=generator)) if n > 1 else 0 for n in views]
    many = isinstance(items[0].label, Tensor)
    return {
        "features": torch.stack([item.features[0] for item in items]),
        "strong": torch.stack([item.features[v] for item, v in zip(items, drawn, strict=True)]),
        "labels": torch.stack([torch.as_tensor(item.label) for item in items]) if many else _labels(items),
        "rows": torch.tensor([item.index for item in items]),
        "clean": torch.tensor([item.clean for item in items]),
    }


def generator_of(rows: Sequence[int]) -> torch.Generator:
    """Random numbers that belong to a batch of rows in their order."""
    digest = hashlib.blake2b(torch.tensor(rows, dtype=torch.long).numpy().tobytes(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _labels(items: Sequence[Item]) -> Tensor:
    return torch.tensor([item.label for item in items], dtype=torch.long)
