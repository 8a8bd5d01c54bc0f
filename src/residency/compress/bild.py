"""BiLD: distil the order of the likely words, not the probability of all of them.

The idea. The logits of a language model have a long tail that is mostly noise, while sampling reads
only how the few likely words rank. BiLD takes the k words the teacher finds most likely, forms the
differences of every pair of their logits, and asks the student for the same differences; then it does
so again on the k words the *student* finds most likely, which pulls down what the student wrongly
believes in. Differences cancel whatever constant a model adds to its logits.

Per token, with temperature τ, teacher logits t, student logits s and I the k selected words in
descending order of the model that leads:

    d^t_mn = (t_Im − t_In) / τ     d^s_mn = (s_Im − s_In) / τ     for the k(k−1)/2 pairs m < n
    p^t = softmax over pairs d^t   p^s = softmax over pairs d^s
    ℓ_I  = KL(p^t ‖ p^s)
    ℓ    = ℓ_(I led by the teacher) + ℓ_(I led by the student)

The paper's: all of the above, k = 8 and τ = 3 for both directions, no τ² factor; the selection is not
differentiated. Our choice: the (sum, count) contract; float32 arithmetic (the official code takes the
softmax in the model's dtype); equal logits are ordered by index; k < 3 is refused, because two words
make one pair, a softmax over one pair is 1, and the loss is zero for every student. The official code
accepts k = 2, and the paper's ablation shows it as merely poor. The official *training* adds a KL on
the prompt tokens and no cross-entropy; here that is for the caller to combine (`kl.py`).

Cost. A token costs O(k²) beside its logits. Dense: both [N, V] logit matrices, and a third in
backward. Fused: both heads once, streamed; backward touches only the 2k selected rows of the head per
token instead of two more products of size [N, V] × D, so it is also faster (`benchmarks/losses.py`).

Paper: Li, Zhou, Song, "BiLD: Bi-directional Logits Difference Loss for Large Language Model
Distillation", COLING 2025, arXiv 2406.13555. Official code: github.com/fpcsong/BiLD, commit c8d40a8
(`distil_losses/BILD.py`; no licence file, so read, compared with, not copied).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from residency.compress.divergence import Divergence, check_logits
from residency.fusedhead import check_pair, selected_logits, top_k, top_k_logits
from residency.objective import Head
from residency.step import Params


class BiLDParams(Params):
    """What BiLD can be told. Defaults are the paper's (its scripts and section on set-up)."""

    k: int = 8
    """Words selected per token and direction, 3 ≤ k ≤ V. More words raise the overlap of the two rankings further; the
    paper calls 8 the knee of its cost.
    """
    temperature: float = Field(3.0, gt=0)
    """Divisor of the logits. Low values did much worse in the paper's ablation."""
    directions: Literal["both", "teacher", "student"] = "both"
    """Who selects the words. "teacher" needs the teacher at words it chose itself, so k cached logits per token are
    enough for it; "student" and "both" need a live teacher.
    """

    @field_validator("k")
    @classmethod
    def _three_words(cls, k: int) -> int:
        if k < 3:
            raise ValueError(
                f"k must be at least 3, got {k}: k = 2 leaves a single pair, whose softmax is 1 "
                "for every student, so the loss and its gradient would be identically zero"
            )
        return k


PAPER = BiLDParams()


def bild(student_logits: Tensor, teacher_logits: Tensor, params: BiLDParams = PAPER) -> tuple[Tensor, Tensor]:
    """BiLD on logits that exist: the reference, and the form for small vocabularies.

    Args:
        student_logits: [N, V] of the trained tokens, any float dtype; receives the gradient.
        teacher_logits: [N, V], same vocabulary; no gradient.
        params: See `BiLDParams`.

    Returns:
        The sum over tokens (scalar float32 or float64) and N. Finite for finite selected logits,
        however large; a −inf is harmless while neither model selects its word. N = 0 gives (0, 0).
    """
    check_logits(student_logits, teacher_logits, None)
    teacher_logits = teacher_logits.detach()
    indices = []
    if params.directions != "student":
        indices.append(top_k(teacher_logits, params.k)[1])
    if params.directions != "teacher":
        indices.append(top_k(student_logits, params.k)[1])
    words = torch.cat(indices, dim=1)
    student, teacher = student_logits.gather(1, words), teacher_logits.gather(1, words)
    return _differences(student, teacher, params)


def bild_fused(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    params: BiLDParams = PAPER,
    *,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """BiLD from hidden states and heads: the same loss and gradients, no [N, V] matrix anywhere.

    Args:
        student_hidden: [N, Ds]; receives the gradient, as does `student_head`.
        student_head: Weight [V, Ds].
        teacher_hidden: [N, Dt]; no gradient. Dt need not equal Ds.
        teacher_head: Weight [V, Dt]; no gradient.
        params: See `BiLDParams`.
        chunk_bytes: Budget of one working block; None takes the device's default.

    Returns:
        As `bild`.
    """
    check_pair(student_hidden, student_head, teacher_hidden, teacher_head)
    indices = []
    if params.directions != "student":
        indices.append(top_k_logits(teacher_hidden, teacher_head, params.k, chunk_bytes=chunk_bytes)[1])
    if params.directions != "teacher":
        indices.append(top_k_logits(student_hidden, student_head, params.k, chunk_bytes=chunk_bytes)[1])
    words = torch.cat(indices, dim=1)
    student = selected_logits(student_hidden, student_head, words, chunk_bytes=chunk_bytes)
    with torch.no_grad():
        teacher = selected_logits(teacher_hidden, teacher_head, words, chunk_bytes=chunk_bytes)
    return _differences(student, teacher, params)


class BiLD(Divergence):
    """BiLD in both forms, with its parameters.

    Inputs: logits, or hidden states and heads, of teacher and student at the trained tokens, selected
    with `next_token_positions`. Same vocabulary.
    Relations: prefer it to `KL` where the specialist will be sampled or ranked with; prefer `KL` where
    probabilities matter (calibration), where V is tiny, or with cross-entropy for the first steps of a
    random student, whose own top k is noise.

    Example:
        >>> loss = BiLD(BiLDParams(k=16))
        >>> total, count = loss.dense(student_logits[mask], teacher_logits[mask])
        >>> (total / count).backward()
    """

    Params = BiLDParams
    params: BiLDParams

    def dense(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `bild`: [N, V] and [N, V] → (sum, count); `targets` are not read."""
        return bild(student_logits, teacher_logits, self.params)

    def fused(
        self,
        student_hidden: Tensor,
        student_head: Head,
        teacher_hidden: Tensor,
        teacher_head: Head,
        targets: Tensor | None = None,
        *,
        chunk_bytes: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `bild_fused`: [N, Ds], a head, [N, Dt], a head → (sum, count); `targets` are not read."""
        return bild_fused(
            student_hidden, student_head, teacher_hidden, teacher_head, self.params, chunk_bytes=chunk_bytes
        )


def _differences(student: Tensor, teacher: Tensor, params: BiLDParams) -> tuple[Tensor, Tensor]:
    """KL between the pair differences of selected logits, one or two sets of k side by side."""
    k = params.k
    precision = torch.promote_types(student.dtype, torch.float32)
    first, second = torch.triu_indices(k, k, offset=1, device=student.device)

    def log_softmax_of_pairs(selected: Tensor) -> Tensor:
        scaled = selected.to(precision).unflatten(1, (-1, k)) / params.temperature
        return (scaled[..., first] - scaled[..., second]).log_softmax(-1)

    total = nn.functional.kl_div(
        log_softmax_of_pairs(student),
        log_softmax_of_pairs(teacher),
        reduction="sum",
        log_target=True,
    )
    return total, torch.tensor(len(student), device=student.device)
