"""overlap@k: how many of the teacher's k likeliest words are among the student's.

The idea. Sampling and search read the few likeliest words, and what a distilled student does there is not visible in
its loss. Per token

    overlap@k = |top_k(student) ∩ top_k(teacher)| / k ∈ [0, 1]

and the mean over tokens, as in BiLD's evaluation; overlap@1 is how often the two would decode the same word. Chance
level is k / V. The order within the top k is not looked at.

Cost. Dense: two top-k. Fused: both heads once, streamed over the vocabulary (`fusedhead.top_k_logits`), nothing of
size [N, V]; O(k log k) per token beyond. No gradient.

Paper: Li, Zhou, Song, "BiLD", COLING 2025, arXiv 2406.13555 (section on analysis). Official code:
github.com/fpcsong/BiLD, commit 4322056 (`acc_overlap_eval.py`). Our choice: (sum, count), so that batches of any
size add up; the official figure is the mean over samples of their means, and in per cent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from residency.compress.divergence import check_logits
from residency.fusedhead import check_pair, top_k, top_k_logits
from residency.objective import Head


def overlap(student_logits: Tensor, teacher_logits: Tensor, k: int = 8) -> tuple[Tensor, Tensor]:
    """overlap@k on logits that exist.

    Args:
        student_logits: [N, V] of the trained tokens.
        teacher_logits: [N, V], same vocabulary.
        k: 1 ≤ k ≤ V.

    Returns:
        The sum over tokens (scalar float64) and N; their quotient is overlap@k.
    """
    check_logits(student_logits, teacher_logits, None)
    return _shared(top_k(student_logits, k)[1], top_k(teacher_logits, k)[1])


def overlap_fused(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    k: int = 8,
    *,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """overlap@k from hidden states [N, Ds], [N, Dt] and heads, without [N, V]; returns as `overlap`."""
    check_pair(student_hidden, student_head, teacher_hidden, teacher_head)
    return _shared(
        top_k_logits(student_hidden, student_head, k, chunk_bytes=chunk_bytes)[1],
        top_k_logits(teacher_hidden, teacher_head, k, chunk_bytes=chunk_bytes)[1],
    )


def _shared(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of distinct words [N, k] per token: sorted together, a shared word stands beside itself."""
    (N, k), together = mine.shape, torch.cat((mine, theirs), dim=1).sort(dim=1).values
    shared = (together[:, 1:] == together[:, :-1]).sum()
    return shared.double() / k, torch.tensor(N, device=mine.device)
