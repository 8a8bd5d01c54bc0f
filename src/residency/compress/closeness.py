"""How near a student is to its teacher, by measures that are not the loss it was trained on.

    overlap@k   mean over answer tokens of |top-k words of the student ∩ top-k words of the teacher| / k
    KL          mean over answer tokens of KL(teacher ‖ student), nats

Overlap asks for the ranking, KL for the probabilities; a loss may buy one with the other (`bild.py`), so both are
reported, before and after the training, and along the answer.

Source: overlap@k is BiLD's (Li, Zhou, Song, COLING 2025, arXiv 2406.13555, section on analysis).
Cost: one pass of both models over the rows given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from residency.compress.kl import kl_fused
from residency.compress.overlap import overlap_fused
from residency.compress.teacher import head_of, last_hidden
from residency.errors import DataError
from residency.modes import evaluating
from residency.objective import next_token_positions

KS = (1, 8)
PLACES = (1, 2, 4, 8, 16, 32, 64)
"""Upper ends of the buckets of answer positions, counted from 1; the last bucket is open."""


@dataclass
class Closeness:
    """Means over answer tokens.

    Args:
        overlap: k → mean share.
        kl: Nats.
        by_place: Mean KL of the answer's tokens in each bucket of `PLACES`, None where there is none.
    """

    overlap: dict[int, float] = field(default_factory=dict)
    kl: float = 0.0
    by_place: list[float | None] = field(default_factory=list)


@torch.no_grad()
def compare(
    student: Any, teacher: Any, batches: Iterable[dict[str, Any]], device: str = "cpu", shared: int | None = None
) -> Closeness:
    """Compare two language models on the answers of some rows.

    Args:
        student: A causal language model; its mode is restored.
        teacher: Likewise.
        batches: `input_ids`, `attention_mask`, `labels` [B, T].
        device: Where both compute.
        shared: Compare the first so many words only.
    """
    heads = head_of(student, shared), head_of(teacher, shared)
    overlaps, tokens = dict.fromkeys(KS, 0.0), 0
    divergence, counts = [0.0] * (len(PLACES) + 1), [0] * (len(PLACES) + 1)
    ends = torch.tensor(PLACES)
    with evaluating(student), evaluating(teacher):
        for batch in batches:
            given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            mask, _ = next_token_positions(given["labels"])
            mine, theirs = last_hidden(student, given)[mask], last_hidden(teacher, given)[mask]
            tokens += len(mine)
            for k in KS:
                overlaps[k] += float(overlap_fused(mine, heads[0], theirs, heads[1], k)[0])
            place = torch.bucketize(mask.cumsum(1)[mask].cpu(), ends).to(device)
            for bucket in place.unique().tolist():
                some = place == bucket
                divergence[bucket] += float(kl_fused(mine[some], heads[0], theirs[some], heads[1])[0])
                counts[bucket] += int(some.sum())
    if not tokens:
        raise DataError("no answer token to compare the models on")
    by_place = [d / n if n else None for d, n in zip(divergence, counts, strict=True)]
    return Closeness({k: v / tokens for k, v in overlaps.items()}, sum(divergence) / tokens, by_place)


def figure(before: Closeness, after: Closeness) -> dict[str, Any]:
    """Divergence along the answer, before and after the training, as a figure spec."""
    starts = [1, *(place + 1 for place in PLACES[:-1])]
    names = [f"{low}-{high}" if low < high else str(high) for low, high in zip(starts, PLACES, strict=True)]
    names.append(f"over {PLACES[-1]}")
    found = [i for i, value in enumerate(after.by_place) if value is not None]
    return {
        "kind": "lines",
        "title": "Divergence from the teacher along the answer",
        "xlabel": "place of the token in the answer",
        "ylabel": "KL, nats per token",
        "series": [
            {"name": name, "x": [names[i] for i in found], "y": [round(c.by_place[i] or 0.0, 5) for i in found]}
            for name, c in (("before training", before), ("after", after))
        ],
    }
