"""Which rows deserve their label, by what is written about them: the captions nearest to a text about the class.

A query on the web returns pictures of another sense of the word, consistently: the pictures' neighbours agree with one
another, and only text tells the senses apart. So, with t_c the vector of a text about class c, and ŝ_i a caption's,
smoothed over the neighbours of the picture (`neighbours.smooth`: a picture with a bad caption looks like pictures with
good ones):

    D_c = the K rows labelled c with the smallest distance between t_c and ŝ_i

The distance is the k-reciprocal one among the class's rows and t_c, or 1 − cosine. The rows of D_c stand in for clean
examples: prototypes begin as their means.

Rows without a caption, none of whose neighbours has one, are never chosen (our choice; the release embeds a blank).

Cost: n_c² D per class for the re-ranking, n_c D without.

Paper: Qin et al., CAPro, NeurIPS 2023, arXiv 2310.09761 (K = 50, sentence vectors of all-MiniLM-L6-v2, class texts from
WordNet: lemmas, definitions, examples of a concept and its relations). Official code: github.com/yuleiqin/capro, commit
bd1771c (no licence; read for facts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from residency.adapt.neighbours import Reciprocal


@dataclass(frozen=True)
class Matched:
    """Rows chosen for their captions.

    Args:
        chosen: [N, C] bool.
        distance: [N, C] of the rows that carry the label and have a text, +inf elsewhere.
    """

    chosen: Tensor
    distance: Tensor


def match(
    captions: Tensor,
    class_texts: Tensor,
    labels: Tensor,
    k: int,
    *,
    known: Tensor | None = None,
    rerank: bool = True,
    k1: int = 20,
    k2: int = 6,
    share: float = 0.3,
) -> Matched:
    """The K rows of every class whose captions are nearest to the class's text.

    Args:
        captions: ŝ [N, D].
        class_texts: t [C, D].
        labels: [N] classes, or [N, C] where several may be true.
        k: K; all of them where a class has fewer.
        known: [N] bool, rows that have a text at all.
        rerank: By k-reciprocal distance.
        k1: See `neighbours.Reciprocal`.
        k2: The same.
        share: The same.

    Raises:
        ValueError: When shapes do not fit, or K < 1.
    """
    if captions.shape[1:] != class_texts.shape[1:] or len(labels) != len(captions) or k < 1:
        raise ValueError(
            f"captions {[*captions.shape]}, class texts {[*class_texts.shape]} and {len(labels)} labels do not fit, or "
            f"fewer than one row is wanted ({k})"
        )
    classes = len(class_texts)
    member = labels.bool() if labels.dim() == 2 else torch.nn.functional.one_hot(labels, classes).bool()
    if known is not None:
        member = member & known[:, None]
    distance = torch.full(member.shape, torch.inf, dtype=captions.dtype, device=captions.device)
    chosen = torch.zeros_like(member)
    for c in range(classes):
        rows = member[:, c].nonzero()[:, 0]
        if not len(rows):
            continue
        world = torch.cat([class_texts[c : c + 1].to(captions), captions[rows]])
        if rerank:
            everyone = torch.arange(1, len(world), device=captions.device)
            found = Reciprocal(world, k1, k2, share).distances(everyone.new_zeros(1), everyone[None])[0]
        else:
            unit = torch.nn.functional.normalize(world, dim=-1)
            found = 1 - unit[1:] @ unit[0]
        distance[rows, c] = found
        chosen[rows[found.argsort(stable=True)[:k]], c] = True
    return Matched(chosen, distance)
