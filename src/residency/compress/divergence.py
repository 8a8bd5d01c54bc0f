"""What every distillation loss looks like, and three ways to get a fused form for the price of a dense one.

The idea. A distillation loss compares the student's and the teacher's logits of the same N tokens and returns
(sum, count). It exists twice: `dense`, on logits [N, V] that exist, is the reference and serves classifiers; `fused`,
on hidden states and heads, computes the logits of a few tokens, the loss and its gradient, and forgets them
(`fusedhead.py`). Writing the second by hand for every loss would be most of the work, so three bases derive it:

- `RowDivergence`: the loss is any differentiable function of a block of tokens' logits. The block is differentiated
  by autograd on its own, its gradient handed to the fused head, and its graph freed before the next block. A loss is
  then one method; nothing of size [N, V] is held.
- `PointwiseDivergence`: the loss is a sum over words of f(p_v, q_v), p the teacher's probability and q the student's.
  With q = softmax(s / τ) the gradient is known in closed form, from the one derivative that differs between losses:

      d_v = q_v ∂f/∂q_v          ∂ℓ/∂s_v = (d_v − q_v Σ_u d_u) / τ

  A multiple of q may be added to d (it cancels), which shortens most of them to the terms of f itself. No graph is
  built: six blocks [n, V] instead of about ten, and 3 to 15 % less processor time, with the two heads counted.
- `SoftmaxDivergence`: between the two, for a loss that autograd can differentiate with respect to probabilities p (a
  sort, a transport). Only the softmax is taken by hand, in place: ∂ℓ/∂s = q (g − Σ_u q_u g_u) / τ for g = ∂ℓ/∂q.

Arithmetic is float32 (float64 for float64 inputs) whatever the dtype of the inputs. The teacher receives no gradient.
`targets` are the reference tokens, for the losses that treat them apart; the others ignore them.

Cost. A fused form does the matrix products of the dense one and holds a few blocks of `chunk_bytes`
(`benchmarks/losses.py`). All of this is our choice; the losses and their papers stand in `divergences.py`, `bild.py`,
`kl.py`, `sinkd.py` and `uld.py`. Whose idea the gradient in the forward is: see `fusedhead.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from residency import fusedhead
from residency.objective import Head


class Divergence(nn.Module):
    """A loss between a student's and a teacher's logits of the same N tokens, in two forms.

    Args:
        params: An instance of the class's `Params`; None takes the defaults.
    """

    Params: ClassVar[Any]
    """The parameter model: its defaults are the paper's."""
    one_vocabulary: ClassVar[bool] = True
    """Whether the two models must share a vocabulary."""

    def __init__(self, params: Any = None) -> None:
        super().__init__()
        self.params = self.Params() if params is None else params

    def dense(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss on logits that exist.

        Args:
            student_logits: [N, V] of the trained tokens, any float dtype; receives the gradient.
            teacher_logits: [N, V]; no gradient.
            targets: [N] reference tokens, `IGNORE` where there is none; most losses ignore them.

        Returns:
            The sum over tokens (scalar float32 or float64) and N. N = 0 gives (0, 0).
        """
        raise NotImplementedError("abstract: a Divergence defines dense(student_logits, teacher_logits, targets)")

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
        """The same loss and gradients from hidden states and heads, without [N, V].

        Args:
            student_hidden: [N, Ds]; receives the gradient, as does `student_head`.
            student_head: Weight [V, Ds].
            teacher_hidden: [N, Dt]; no gradient. Dt need not equal Ds.
            teacher_head: Weight [V, Dt]; no gradient.
            targets: As in `dense`.
            chunk_bytes: Budget of one working block, of which a few are held; None takes the device's default.

        Returns:
            As `dense`.
        """
        raise NotImplementedError("abstract: a Divergence defines fused(student_hidden, student_head, …)")

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `dense`."""
        return self.dense(student_logits, teacher_logits, targets)

    def extra_repr(self) -> str:
        """The parameters, for `print(model)`."""
        return repr(self.params)


class RowDivergence(Divergence):
    """A loss given as a differentiable function of the logits of some tokens; the fused form comes by itself.

    A subclass defines `rows`. Example, the whole of mean squared logits:

        >>> class SquaredLogits(RowDivergence):
        ...     Params = NoParams
        ...
        ...     def rows(self, student, teacher, targets):
        ...         return (student - teacher).square().sum()
    """

    @property
    def unit(self) -> int | None:
        """Tokens that must stand in one block (a group that is compared as a whole); None for all of them."""
        return 1

    def rows(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        """The loss of a few tokens, summed.

        Args:
            student: [n, V], float32 or float64; differentiate through it.
            teacher: [n, V] (or its own vocabulary), same dtype, no gradient.
            targets: [n] or None.
        """
        raise NotImplementedError("abstract: a RowDivergence defines rows(student, teacher, targets)")

    def dense(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Divergence.dense`."""
        check_logits(student_logits, teacher_logits, targets, one_vocabulary=self.one_vocabulary)
        precision = torch.promote_types(student_logits.dtype, torch.float32)
        total = self.rows(student_logits.to(precision), teacher_logits.detach().to(precision), targets)
        return total, _count(student_logits)

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
        """See `Divergence.fused`."""
        check_hidden(
            student_hidden, student_head, teacher_hidden, teacher_head, targets, one_vocabulary=self.one_vocabulary
        )

        def row_loss(logits: Tensor, rows: slice, differentiate: bool) -> Tensor:
            teacher = logits.new_empty(len(logits), len(teacher_head.weight))
            fusedhead.chunk_logits(teacher_hidden[rows], teacher_head, out=teacher, chunk_bytes=teacher.nbytes)
            some = None if targets is None else targets[rows]
            return self._rows_of_block(logits, teacher, some, differentiate)

        budget = self._block(student_hidden, student_head, chunk_bytes)
        total = fusedhead.fused_sum(student_hidden, student_head, row_loss, chunk_bytes=budget)
        return total, _count(student_hidden)

    def _rows_of_block(self, logits: Tensor, teacher: Tensor, targets: Tensor | None, differentiate: bool) -> Tensor:
        """A `fusedhead.RowLoss` that has the teacher's logits too; both blocks are its own to overwrite."""
        with torch.set_grad_enabled(differentiate):
            student = logits.detach().requires_grad_(differentiate)
            total = self.rows(student, teacher, targets)
        if differentiate:
            logits.copy_(torch.autograd.grad(total, student)[0])
        return total.detach()

    def _block(self, hidden: Tensor, head: Head, chunk_bytes: int | None) -> int:
        """The budget in bytes that makes blocks of whole units; at least one unit is held."""
        unit = max(1, len(hidden)) if self.unit is None else self.unit
        one = unit * len(head.weight) * _precision(hidden, head.weight).itemsize
        budget = _budget(hidden, chunk_bytes)
        return budget if unit == 1 else max(1, budget // one) * one


class SoftmaxDivergence(RowDivergence):
    """A loss given as a differentiable function of the softened distributions of some tokens.

    A subclass defines `between`; its params have `temperature`.
    """

    def between(self, q: Tensor, p: Tensor) -> Tensor:
        """The loss of a few tokens, summed.

        Args:
            q: [n, V] the student's probabilities; differentiate through them.
            p: [n, V] the teacher's (or its own vocabulary), no gradient.
        """
        raise NotImplementedError("abstract: a SoftmaxDivergence defines between(q, p)")

    def rows(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        """See `RowDivergence.rows`; `targets` are not read."""
        return self.between(*((logits / self.params.temperature).softmax(1) for logits in (student, teacher)))

    def _rows_of_block(self, logits: Tensor, teacher: Tensor, targets: Tensor | None, differentiate: bool) -> Tensor:
        q, p = (z.div_(self.params.temperature).softmax(1) for z in (logits, teacher))
        with torch.set_grad_enabled(differentiate):
            total = self.between(q.requires_grad_(differentiate), p)
        if differentiate:
            (slope,) = torch.autograd.grad(total, q)
            q = q.detach()
            mean = torch.mul(q, slope, out=logits).sum(1, keepdim=True)
            logits.addcmul_(q, mean, value=-1).div_(self.params.temperature)
        return total.detach()


class PointwiseDivergence(Divergence):
    """A loss Σ_v f(p_v, q_v) of the softened distributions, its gradient in closed form.

    A subclass defines `value` and `slope`; its params have `temperature` and may have `scale_by_t2`.
    """

    def value(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """f(p_v, q_v) per word.

        Args:
            p: [n, V] the teacher's probabilities.
            q: [n, V] the student's.
            log_p: [n, V] their logarithms; may hold −inf.
            log_q: [n, V].

        Returns:
            [n, V].
        """
        raise NotImplementedError("abstract: a PointwiseDivergence defines value(p, q, log_p, log_q)")

    def slope(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """q_v ∂f/∂q_v per word, up to a multiple of q: a new [n, V]."""
        raise NotImplementedError("abstract: a PointwiseDivergence defines slope(p, q, log_p, log_q)")

    @property
    def factor(self) -> float:
        """What the sum is multiplied by: τ² where the params ask for it."""
        return self.params.temperature**2 if getattr(self.params, "scale_by_t2", False) else 1.0

    def dense(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Divergence.dense`."""
        check_logits(student_logits, teacher_logits, targets)
        precision = torch.promote_types(student_logits.dtype, torch.float32)
        temperature = self.params.temperature
        log_q = (student_logits.to(precision) / temperature).log_softmax(1)
        log_p = (teacher_logits.detach().to(precision) / temperature).log_softmax(1)
        return self.value(log_p.exp(), log_q.exp(), log_p, log_q).sum() * self.factor, _count(student_logits)

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
        """See `Divergence.fused`."""
        check_hidden(student_hidden, student_head, teacher_hidden, teacher_head, targets)
        temperature, factor = self.params.temperature, self.factor

        def row_loss(logits: Tensor, rows: slice, differentiate: bool) -> Tensor:
            log_q = logits.div_(temperature).log_softmax(1)
            fusedhead.chunk_logits(teacher_hidden[rows], teacher_head, out=logits, chunk_bytes=logits.nbytes)
            log_p = logits.div_(temperature).log_softmax(1)
            p, q = log_p.exp(), torch.exp(log_q, out=logits)
            total = self.value(p, q, log_p, log_q).sum() * factor
            if differentiate:
                slope = self.slope(p, q, log_p, log_q)
                q.mul_(-slope.sum(1, keepdim=True)).add_(slope).mul_(factor / temperature)
            return total

        budget = _budget(student_hidden, chunk_bytes)
        total = fusedhead.fused_sum(student_hidden, student_head, row_loss, chunk_bytes=budget)
        return total, _count(student_hidden)


def check_logits(student: Tensor, teacher: Tensor, targets: Tensor | None, *, one_vocabulary: bool = True) -> None:
    """Raise ValueError unless both are [N, V] (or [N, Vs] and [N, Vt]) and targets, if any, [N]."""
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"student and teacher logits must both be [N, V] of the same tokens, got {[*student.shape]} and "
            f"{[*teacher.shape]}; select the trained tokens first: logits[mask]"
        )
    if one_vocabulary and student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits must both be [N, V], got {[*student.shape]} and {[*teacher.shape]}: "
            "this loss compares word by word and needs one vocabulary (`uld` does not)"
        )
    _check_targets(targets, len(student), student.shape[1])


def check_hidden(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    targets: Tensor | None,
    *,
    one_vocabulary: bool = True,
) -> None:
    """The same for hidden states and heads."""
    if one_vocabulary:
        fusedhead.check_pair(student_hidden, student_head, teacher_hidden, teacher_head)
    else:
        for hidden, head, whose in (
            (student_hidden, student_head, "student"),
            (teacher_hidden, teacher_head, "teacher"),
        ):
            if hidden.ndim != 2 or hidden.shape[1:] != head.weight.shape[1:]:
                raise ValueError(
                    f"the {whose}'s hidden must be [N, D] and its head's weight [V, D], got {[*hidden.shape]} and "
                    f"{[*head.weight.shape]}"
                )
        if len(student_hidden) != len(teacher_hidden):
            raise ValueError(
                f"student has {len(student_hidden)} tokens and teacher {len(teacher_hidden)}, not the same tokens; "
                "select the aligned ones first: hidden[pairs]"
            )
    _check_targets(targets, len(student_hidden), len(student_head.weight))


def _check_targets(targets: Tensor | None, N: int, V: int) -> None:
    if targets is not None and targets.shape != (N,):
        raise ValueError(f"targets must be [N] = [{N}], got {[*targets.shape]}")
    if targets is not None and N and int(targets.max()) >= V:
        raise ValueError(f"a target is {int(targets.max())}, but the vocabulary has {V} words")


def _budget(hidden: Tensor, chunk_bytes: int | None) -> int:
    """Half of the fused head's default: these losses hold many blocks, and halving them cost 0 to 8 % of the time."""
    if chunk_bytes is not None:
        return chunk_bytes
    return (fusedhead.LOGITS_BYTES if hidden.device.type == "cpu" else fusedhead.ACCELERATOR_BYTES) // 2


def _precision(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _count(tokens: Tensor) -> Tensor:
    return torch.tensor(len(tokens), device=tokens.device)
