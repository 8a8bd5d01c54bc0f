"""SinKD: carry the student's answers of a batch onto the teacher's at the least cost.

The idea. KL compares the two models sample by sample and word by word, and says little where their supports hardly
overlap. SinKD takes the B outputs of the student and the B of the teacher as two sets of points, prices a pair by the
distance of the two distributions, and pays the entropic transport cost between the sets. With τ = 2, ε = 0.1:

    q_i = softmax(s_i / τ)    p_j = softmax(t_j / τ)    D_ij = ‖q_i − p_j‖₁ ∈ [0, 2]
    P   = 20 Sinkhorn iterations on exp(−D / ε), rows then columns, all sums 1
    ℓ   = ⟨P, D⟩, the sum over the B samples

It knows the batch as a *set*: permuting the student's outputs changes nothing, so it needs a loss per sample beside it
(the paper adds cross-entropy and KL, and gives SinKD a weight of about 0.013 per sample). Four remedies, all ours:

- `paired`: adds this price to every pair i ≠ j; towards infinity the plan is the identity and ℓ = Σ_i ‖q_i − p_i‖₁.
- `debias`: OT(q, p) − ½ OT(q, q) − ½ OT(p, p), zero where the sets agree; ⟨P, D⟩ of a batch with itself is not.
- `gradient: envelope`: no iteration is kept; the loss is then the regularised value (`sinkhorn.py`), so that value and
  gradient belong together: ⟨P, D⟩ plus up to ε log B per sample. With `debias` it is never negative. "unrolled" is the
  official loss.
- `words`: the price is taken over the k words likeliest in the group, teacher's and student's mean together, and one
  bucket of all others. It is never above the full price, and below it by at most 2 min(rest of q_i, rest of p_j).

`plan: sample` transports between the classes of each sample instead: prices |q_m − p_n|, all sums 1, a C × C plan.
That is our reading of the paper's sample-wise form (its released code, B = 1, has no plan left); for ε → 0 it is the
sum of sorted differences, `uld.py`.

Causal language models. The samples are the trained tokens, in groups of `group` consecutive ones (the last takes what
is left): our choice, the paper's batch of 16. So the loss depends on how tokens fall into micro-batches; nothing else
here does. `group: null` takes all N as one, as for a classifier's batch.

Numbers. Log domain: exp(−D / ε) is 0 in float16. The official loss keeps B × B tensors of every iteration; here they
are of one block. In high dimension the prices concentrate (1,000 random classes: spread ≪ ε) and the plan is nearly
uniform: `words`, or a smaller ε.

Cost. N · group · V differences, twice; for group = 16 less than the two heads. Fused: whole groups per block of
`chunk_bytes`, at least one, so a long group takes long blocks. Faster and 1/8 of the memory of softmax + `torch.cdist`
(`benchmarks/losses.py`).

Paper: Cui, Qin, Gao et al., "Sinkhorn Distance Minimization for Knowledge Distillation", LREC-COLING 2024, arXiv
2402.17110. Official code: github.com/2018cx/SinKD, commit 1ffac90 (read for facts; its Sinkhorn term is never added
with the flags it ships, and its T0 variant takes the softmax over positions).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from residency.compress.divergence import SoftmaxDivergence
from residency.compress.sinkhorn import sinkhorn
from residency.step import Params

BLOCK = 2**19
"""Differences held at once by `distances`: a cache, on the CPU it was measured on (three times as fast as cdist)."""
MAX_CLASSES = 2048
"""The largest C × C plan of the sample-wise form, 16 MB a sample in float32."""


class SinKDParams(Params):
    """Parameters of `SinKD`; temperature, epsilon, iterations, norm, plan and gradient are those of its code."""

    temperature: float = Field(2.0, gt=0)
    """Divisor of both models' logits."""
    epsilon: float = Field(0.1, gt=0)
    """Strength of the entropy, in units of the price (0 to 2 for norm 1)."""
    iterations: int = Field(20, ge=1)
    """Sinkhorn iterations."""
    norm: float = Field(1.0, ge=1)
    """The price is the distance in this norm: 1 for the sum of absolute differences, 2 for the Euclidean. Read by
    plan: batch.
    """
    plan: Literal["batch", "sample"] = "batch"
    """Transport between the samples of a group, or between the classes of each sample."""
    group: int | None = Field(16, ge=1)
    """Consecutive tokens that form one batch; null for all of them, as in classification. Read by plan: batch."""
    gradient: Literal["unrolled", "envelope"] = "unrolled"
    """Through all iterations (official), or at a plan held fixed, with the regularised value."""
    debias: bool = False
    """Subtract half the loss of each set with itself."""
    paired: float = Field(0.0, ge=0)
    """Price added to every pair of different samples. Read by plan: batch."""
    words: int | None = Field(None, ge=1)
    """Take prices over so many likeliest words and one bucket of the rest; null for all words."""

    @model_validator(mode="after")
    def _keys_are_read(self) -> SinKDParams:
        unread = self.model_fields_set & {"group", "norm", "paired"}
        if self.plan == "sample" and unread:
            raise ValueError(f"`{sorted(unread)[0]}` belongs to plan: batch; plan: sample transports within one sample")
        return self


class SinKD(SoftmaxDivergence):
    """Sinkhorn distance between the student's and the teacher's outputs, batch-wise or sample-wise.

    Inputs: as every `Divergence`; logits [B, C] of a classifier with `group=None`. Same vocabulary.
    Relations: an addition to `KL` or cross-entropy, never alone (see above); `ULD` for different vocabularies.

    Example:
        >>> sinkd = SinKD(SinKDParams(group=None))
        >>> total, count = sinkd.dense(student_logits, teacher_logits)
        >>> loss = cross_entropy + 0.013 * total / count
    """

    Params = SinKDParams
    params: SinKDParams

    @property
    def unit(self) -> int | None:
        """See `RowDivergence.unit`."""
        return self.params.group if self.params.plan == "batch" else 1

    def between(self, q: Tensor, p: Tensor) -> Tensor:
        """See `SoftmaxDivergence.between`."""
        if self.params.plan == "sample":
            return self._sample_wise(q, p)
        n, V = q.shape
        g = min(n, self.params.group or n)
        whole = n // g * g if g else 0
        total = q.sum() * 0  # keeps the graph of an empty batch
        for part, size in ((slice(0, whole), g), (slice(whole, n), n - whole)):
            if size and part.stop > part.start:
                total = total + self._batch_wise(q[part].view(-1, size, V), p[part].view(-1, size, V))
        return total

    def _batch_wise(self, q: Tensor, p: Tensor) -> Tensor:
        """Σ over groups of the loss between [G, g, V] and [G, g, V]."""
        q, p = self._restrict(q, p)
        different = (1 - torch.eye(q.shape[1], dtype=q.dtype, device=q.device)) * self.params.paired

        def price(x: Tensor, y: Tensor) -> Tensor:
            return distances(x, y, self.params.norm) + different

        return q.shape[1] * self._transport(q, p, price)

    def _sample_wise(self, q: Tensor, p: Tensor) -> Tensor:
        """Σ over samples of the loss between the classes of [n, C] and [n, C]."""
        q, p = (x.squeeze(1) for x in self._restrict(q.unsqueeze(1), p.unsqueeze(1)))
        n, C = q.shape
        if C > MAX_CLASSES:
            raise ValueError(
                f"plan: sample needs a {C:,} × {C:,} plan for every token; restrict it (words: 64) or use plan: batch"
            )
        if n == 0:
            return q.sum()
        return C * self._transport(q.unsqueeze(2), p.unsqueeze(2), lambda x, y: (x - y.mT).abs())

    def _transport(self, x: Tensor, y: Tensor, price: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Σ over problems of the transport between [G, n, d] and [G, n, d] at mass 1."""

        def value(a: Tensor, b: Tensor) -> Tensor:
            params = self.params
            solved = sinkhorn(price(a, b), params.epsilon, iterations=params.iterations, gradient=params.gradient)
            return (solved.transport if params.gradient == "unrolled" else solved.dual).sum()

        if not self.params.debias:
            return value(x, y)
        return value(x, y) - value(x, x) / 2 - value(y, y) / 2

    def _restrict(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest words of each group and the mass of all others: [G, g, V] → [G, g, words + 1]."""
        words = self.params.words
        if words is None or words >= q.shape[2]:
            return q, p
        chosen = (q.detach().sum(1) + p.sum(1)).topk(words, dim=1).indices.unsqueeze(1).expand(-1, q.shape[1], -1)

        def kept(x: Tensor) -> Tensor:
            some = x.gather(2, chosen)
            return torch.cat((some, 1 - some.sum(2, keepdim=True)), 2)

        return kept(q), kept(p)


def distances(x: Tensor, y: Tensor, norm: float = 1.0) -> Tensor:
    """‖x_i − y_j‖ of G sets of points, [G, n, V] and [G, m, V] → [G, n, m]; differentiable once.

    It is `torch.cdist`, except for the norm 1 of few pairs on a CPU, where blocks of the vocabulary are faster.
    """
    if norm == 1 and x.device.type == "cpu" and 0 < len(x) * x.shape[1] * y.shape[1] <= BLOCK // 64:
        return _SumOfDifferences.apply(x, y)
    return torch.cdist(x, y, p=norm, compute_mode="donot_use_mm_for_euclid_dist")


class _SumOfDifferences(torch.autograd.Function):
    """Σ_v |x_iv − y_jv|, block by block; backward is that of cdist."""

    @staticmethod
    def forward(ctx, x, y):
        total = x.new_zeros(len(x), x.shape[1], y.shape[1])
        width = BLOCK // total.numel()
        for start in range(0, x.shape[2], width):
            block = slice(start, start + width)
            total += (x[:, :, None, block] - y[:, None, :, block]).abs_().sum(-1)
        ctx.save_for_backward(x, y, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (x, y, total), slope = ctx.saved_tensors, torch.ops.aten._cdist_backward
        to_x = slope(upstream.contiguous(), x, y, 1.0, total) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None
        return to_x, slope(upstream.mT.contiguous(), y, x, 1.0, total.mT.contiguous())
