"""KL: the student imitates the teacher's whole next-word distribution.

The idea. A teacher's probabilities say more than its answer: which words it would almost have chosen.
The student minimises the divergence from the teacher's distribution to its own, at a temperature that
can bring the improbable words into view. It covers every mode of the teacher ("forward" KL), so a
small student spreads itself thin rather than missing a word.

Per token, with temperature τ, teacher logits t and student logits s:

    p = softmax(t / τ)    q = softmax(s / τ)
    ℓ = τ² Σ_v p_v (log p_v − log q_v)            ∂ℓ/∂s = τ (q − p)

The paper's: the soft targets, and the factor τ² that keeps their gradients in proportion to those of
hard labels when τ changes (section 2). Our choice: τ = 1 by default, usual for language models, where
the factor is 1; the divergence rather than the cross-entropy to p (equal gradients, and zero is zero);
the (sum, count) contract; float32 arithmetic; words the teacher excludes with −inf contribute nothing.

Cost. Dense: about seven [N, V] matrices at its peak. Fused: three blocks of `chunk_bytes`, the gradient
made during the forward (`fusedhead.py`), and the same four matrix products.

Paper: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
Official code: none released.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from residency import fusedhead
from residency.compress.divergence import Divergence, check_logits
from residency.objective import Head
from residency.step import Params


class KLParams(Params):
    """What the divergence can be told."""

    temperature: float = Field(1.0, gt=0)
    """Divisor of both models' logits. Hinton et al. went up to 20 (digits) and 10 (speech); 1 (our choice) imitates the
    distribution the specialist will be sampled from.
    """
    scale_by_t2: bool = True
    """Multiply by temperature², as Hinton et al. advise when soft and hard targets are added up. Without it, the
    gradient shrinks as 1 / temperature² for large temperatures.
    """

    @property
    def factor(self) -> float:
        """What the divergence is multiplied by."""
        return self.temperature**2 if self.scale_by_t2 else 1.0


PLAIN = KLParams()


def kl(student_logits: Tensor, teacher_logits: Tensor, params: KLParams = PLAIN) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) on logits that exist: the reference.

    Args:
        student_logits: [N, V] of the trained tokens, any float dtype; receives the gradient.
        teacher_logits: [N, V], same vocabulary; no gradient.
        params: See `KLParams`.

    Returns:
        The sum over tokens (scalar float32 or float64) and N. N = 0 gives (0, 0). It is +inf where the
        student excludes (−inf) a word the teacher does not, as the divergence is.
    """
    check_logits(student_logits, teacher_logits, None)
    precision = torch.promote_types(student_logits.dtype, torch.float32)
    log_q = (student_logits.to(precision) / params.temperature).log_softmax(1)
    log_p = (teacher_logits.detach().to(precision) / params.temperature).log_softmax(1)
    p = log_p.exp()
    total = (p * (log_p - log_q).where(p > 0, 0)).sum() * params.factor
    return total, torch.tensor(len(student_logits), device=student_logits.device)


def kl_fused(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    params: KLParams = PLAIN,
    *,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) from hidden states and heads, a few tokens' logits at a time.

    Args:
        student_hidden: [N, Ds]; receives the gradient, as does `student_head`.
        student_head: Weight [V, Ds].
        teacher_hidden: [N, Dt]; no gradient. Dt need not equal Ds.
        teacher_head: Weight [V, Dt]; no gradient.
        params: See `KLParams`.
        chunk_bytes: Budget of one [n, V] block, of which three are held; None takes the default.

    Returns:
        As `kl`.
    """
    fusedhead.check_pair(student_hidden, student_head, teacher_hidden, teacher_head)

    def row_loss(logits: Tensor, rows: slice, differentiate: bool) -> Tensor:
        # three blocks [n, V] in all: what is read for the last time gives its place to the next
        log_q = logits.div_(params.temperature).log_softmax(1)
        fusedhead.chunk_logits(teacher_hidden[rows], teacher_head, out=logits, chunk_bytes=logits.nbytes)
        log_p = logits.div_(params.temperature).log_softmax(1)
        p = torch.exp(log_p, out=logits)
        total = log_p.sub_(log_q).masked_fill_(p == 0, 0).mul_(p).sum() * params.factor
        if differentiate:
            torch.sub(log_q.exp_(), p, out=logits).mul_(params.factor / params.temperature)
        return total

    total = fusedhead.fused_sum(student_hidden, student_head, row_loss, chunk_bytes=chunk_bytes)
    return total, torch.tensor(len(student_hidden), device=student_hidden.device)


class KL(Divergence):
    """KL(teacher ‖ student) in both forms, with its parameters.

    Inputs: logits, or hidden states and heads, of teacher and student at the trained tokens, selected
    with `next_token_positions`. Same vocabulary.
    Relations: the default distillation loss and the one to beat; `BiLD` where the ranking of the likely
    words matters more than their probabilities; its relatives stand in `divergences.py`.

    Example:
        >>> total, count = KL().dense(student_logits[mask], teacher_logits[mask])
        >>> (total / count).backward()
    """

    Params = KLParams
    params: KLParams

    def dense(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `kl`: [N, V] and [N, V] → (sum, count); `targets` are not read."""
        return kl(student_logits, teacher_logits, self.params)

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
        """See `kl_fused`: [N, Ds], a head, [N, Dt], a head → (sum, count); `targets` are not read."""
        return kl_fused(
            student_hidden, student_head, teacher_hidden, teacher_head, self.params, chunk_bytes=chunk_bytes
        )
