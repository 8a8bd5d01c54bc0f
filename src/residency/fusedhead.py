"""Losses on logits that never hold the logits: the language-model head, fused into the loss.

The idea. For N = 2,048 trained tokens and V = 49,152 words one float32 logit matrix takes 403 MB; a
distillation step holds the student's, the teacher's and a gradient, far more than the small model
itself. A sum of per-token losses does not need them all at once. Take a few tokens, compute their
logits, the loss and its derivative with respect to those logits at once, push the derivative through
the head, and reuse the buffer for the next tokens:

    z = h Wᵀ + b              [n, V]   n tokens, as many as the byte budget admits
    L += Σ ℓ(z)                        the row loss
    g = ∂L/∂z                 [n, V]   written over z
    ∂L/∂h = g W     ∂L/∂W += gᵀ h     ∂L/∂b += Σₙ g

So the gradient is ready when the loss is, and backward only multiplies it by the upstream scalar.
A loss that reads k logits per token needs still less: find the k (`top_k_logits`), then compute just
those rows of the head, with a sparse derivative (`selected_logits`).

`fused_sum` is the primitive for losses on all V logits: give it a row loss, a function of a few rows.
`cross_entropy_sum` is the shortest example of one; `compress/kl.py` the next. `top_k_logits` and
`selected_logits` serve losses on a few logits; `compress/bild.py` is made of them.

Arithmetic is float32 (float64 if an input is float64), also for bfloat16 and float16 inputs and under
autocast: the logits are then more exact than the half-precision matrix they replace. Gradients come
back in the dtype of their input, after they were summed in float32.

Cost. Time: the three matrix products of the dense loss, no more. Memory beyond the gradients
themselves: a few times `chunk_bytes`, whatever N and V are. With a half-precision head the float32
sum of ∂L/∂W is twice the size of the gradient handed back.

Limits: no second derivatives; `index_add_` makes ∂L/∂W of `selected_logits` depend on thread timing
in its last bits on CUDA. Where sums run in another order than in the dense form, results agree to
rounding, not to the bit.

Whose idea: gradient in the forward, per token chunk, is "Liger Kernel" (Hsu et al. 2024, arXiv
2410.10989); "Cut Your Losses" (Wijmans et al. 2024, arXiv 2411.09009) streams the vocabulary too. Both
are Triton kernels for one loss each. Our choice: plain torch, so it runs on a CPU, for any row loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from residency.objective import IGNORE, Head

RowLoss = Callable[[Tensor, slice, bool], Tensor]
"""`row_loss(logits, rows, differentiate) -> scalar sum` over the logits [n, V] of the tokens `rows`.

If `differentiate`, it leaves ∂sum/∂logits in `logits`; the buffer is its own to overwrite either way.
"""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

LOGITS_BYTES = 32 * 2**20
"""Default `chunk_bytes` of a block of logits on a CPU. Each block of `fused_sum` reads the head and adds to its whole
gradient once, so half the bytes took a third longer; twice as many were no faster (V = 49,152, D = 576)."""
GATHER_BYTES = 4 * 2**20
"""Default `chunk_bytes` of gathered rows of the head on a CPU: a few caches. Their peak adds to that of ∂L/∂W."""
ACCELERATOR_BYTES = 256 * 2**20
"""Default `chunk_bytes` elsewhere: enough work per kernel launch, little beside a model. Our choice, not measured."""
MAX_ROWS = 1024
"""Tokens per block of the top-k search: beyond this the block is better spent on vocabulary."""


def cross_entropy_sum(hidden: Tensor, head: Head, targets: Tensor, *, chunk_bytes: int | None = None) -> Tensor:
    """Σ −log softmax(hidden @ weight.T + bias)[target], without the logits.

    Args:
        hidden: [N, D].
        head: Weight [V, D], bias [V] or None.
        targets: [N] token ids; `IGNORE` adds nothing to the sum nor to any gradient.
        chunk_bytes: Budget in bytes of one working block; None takes the device's default.

    Returns:
        A scalar, float32 (float64 for float64 inputs). Divide it by the count of the whole step.
    """
    _check(hidden, head)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [N] = {[*hidden.shape[:1]]}, got {[*targets.shape]}")

    def row_loss(logits: Tensor, rows: slice, differentiate: bool) -> Tensor:
        trained = targets[rows] != IGNORE
        index = targets[rows].where(trained, 0).unsqueeze(1)
        log_p = logits.log_softmax(1)  # a second block, but one pass where softmax by hand takes four
        if differentiate:
            torch.exp(log_p, out=logits).scatter_add_(1, index, -torch.ones_like(logits[:, :1]))
            logits.masked_fill_(~trained.unsqueeze(1), 0)
        return -log_p.gather(1, index).squeeze(1).where(trained, 0).sum()

    return fused_sum(hidden, head, row_loss, chunk_bytes=chunk_bytes)


def fused_sum(hidden: Tensor, head: Head, row_loss: RowLoss, *, chunk_bytes: int | None = None) -> Tensor:
    """Sum of a loss over tokens, its gradient computed on the way; logits exist a few rows at a time.

    Args:
        hidden: [N, D]; N may be 0.
        head: Weight [V, D], bias [V] or None; they receive gradients if they require them.
        row_loss: See `RowLoss`. Tensors it closes over (targets, a teacher) receive no gradient.
        chunk_bytes: Budget in bytes of one [n, V] block, of which at least one row is held.

    Returns:
        A scalar. Differentiable once; a second backward through a retained graph computes again.
    """
    _check(hidden, head)
    inputs = (hidden, head.weight, head.bias)
    # asked for here, because inside a Function gradients look switched off and inputs look trainable
    needs = tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs)
    return _FusedSum.apply(*inputs, row_loss, _budget(hidden, chunk_bytes, LOGITS_BYTES), needs)


@torch.no_grad()
def chunk_logits(hidden: Tensor, head: Head, *, out: Tensor, chunk_bytes: int) -> Tensor:
    """Logits of a few rows in the working precision of `out`, for row losses that need a teacher's.

    Args:
        hidden: [n, D].
        head: Weight [V, D], converted block by block if its dtype differs.
        out: [n, V], overwritten and returned.
        chunk_bytes: Budget in bytes of the converted block.
    """
    hidden = hidden.to(out.dtype)
    for columns in _columns(head.weight, out.dtype, chunk_bytes):
        block = head.weight[columns].to(out.dtype)
        torch.mm(hidden, block.T, out=out[:, columns])
    return out if head.bias is None else out.add_(head.bias)


@torch.no_grad()
def top_k_logits(hidden: Tensor, head: Head, k: int, *, chunk_bytes: int | None = None) -> tuple[Tensor, Tensor]:
    """The k largest logits per token, streamed over blocks of the vocabulary. No gradient.

    Args:
        hidden: [N, D].
        head: Weight [V, D], bias [V] or None.
        k: 1 ≤ k ≤ V.
        chunk_bytes: Budget in bytes of one block [n, v] of logits.

    Returns:
        Values [N, k] in descending order, float32 or float64, and indices [N, k]. See `top_k` on ties.
    """
    _check(hidden, head)
    N, D = hidden.shape
    V = head.weight.shape[0]
    _check_k(k, V)
    dtype, budget = _precision(hidden, head.weight), _budget(hidden, chunk_bytes, LOGITS_BYTES)
    held = budget // dtype.itemsize
    rows = max(1, min(N, MAX_ROWS, held))
    width = max(1, min(V, held // max(rows, D)))  # neither the logits nor a converted block exceed the budget
    values = hidden.new_empty(N, k, dtype=dtype)
    indices = torch.empty(N, k, dtype=torch.long, device=hidden.device)
    buffer = hidden.new_empty(rows * width, dtype=dtype)
    for part in _blocks(N, rows):
        tokens = hidden[part].to(dtype)
        best, where = tokens.new_empty(len(tokens), 0), indices.new_empty(len(tokens), 0)
        for columns in _blocks(V, width):
            block = head.weight[columns].to(dtype)
            logits = torch.mm(tokens, block.T, out=_view(buffer, len(tokens), len(block)))
            if head.bias is not None:
                logits += head.bias[columns]
            found, at = logits.topk(min(k, len(block)), dim=1)
            best, where = torch.cat((best, found), 1), torch.cat((where, at + columns.start), 1)
            best, at = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, at)
        values[part], indices[part] = _ordered(best, where)
    return values, indices


@torch.no_grad()
def log_sum_exp(hidden: Tensor, head: Head, *, chunk_bytes: int | None = None) -> Tensor:
    """Logarithm of Σ_v exp(logit_v) per token, [N], a few rows of logits at a time. No gradient."""
    _check(hidden, head)
    sums = hidden.new_empty(len(hidden), dtype=_precision(hidden, head.weight))

    def row_loss(logits: Tensor, rows: slice, differentiate: bool) -> Tensor:
        sums[rows] = logits.logsumexp(1)
        return logits.new_zeros(())

    fused_sum(hidden, head, row_loss, chunk_bytes=chunk_bytes)
    return sums


@torch.no_grad()
def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of [N, V] logits per row: what `top_k_logits` finds, from logits that exist.

    Ties. Equal logits inside the set are listed by ascending index, so the dense and the streamed
    form agree. Which of several logits equal to the k-th one belongs to the set is left to
    `torch.topk`, as in everybody's code; between half-precision logits that does happen.
    """
    _check_k(k, logits.shape[-1])
    return _ordered(*logits.topk(k, dim=-1))


def selected_logits(hidden: Tensor, head: Head, indices: Tensor, *, chunk_bytes: int | None = None) -> Tensor:
    """The logits of K chosen words per token, hidden · W[index] + bias[index], with sparse work.

    Args:
        hidden: [N, D].
        head: Weight [V, D], bias [V] or None.
        indices: [N, K] word ids; a word may repeat.
        chunk_bytes: Budget in bytes of the gathered rows of the head, [n, K, D].

    Returns:
        [N, K], float32 (float64 for float64 inputs). Differentiable once, with respect to hidden and
        head; rows of the head that no token selected get a gradient of exactly zero.
    """
    _check(hidden, head)
    budget = _budget(hidden, chunk_bytes, GATHER_BYTES)
    return _SelectedLogits.apply(hidden, head.weight, head.bias, indices, budget)


class _FusedSum(torch.autograd.Function):
    """Autograd's view of `fused_sum`: the gradient is stored by forward and scaled by backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, row_loss, budget, needs):
        total, ctx.gradients = _sweep(hidden, weight, bias, row_loss, budget, needs)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.arguments = row_loss, budget, needs
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        # Handed over rather than copied: ∂L/∂W is the largest tensor here and the caller will own it.
        # A second backward (retain_graph) finds them gone and sweeps again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _sweep(*ctx.saved_tensors, *ctx.arguments)
        scaled = (
            None if gradient is None else gradient.mul_(upstream).to(tensor.dtype)
            for gradient, tensor in zip(gradients, ctx.saved_tensors, strict=True)
        )
        return *scaled, None, None, None


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_loss: RowLoss,
    budget: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """One pass over the tokens: the loss sum, and the gradients that `needs` asks for."""
    N, V = hidden.shape[0], weight.shape[0]
    head, dtype = Head(weight, bias), _precision(hidden, weight)
    total = hidden.new_zeros((), dtype=dtype)
    to_hidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
    to_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
    to_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None
    rows = max(1, min(N, budget // (V * dtype.itemsize)))
    buffer = hidden.new_empty(rows, V, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in _blocks(N, rows):
            tokens = hidden[part].to(dtype)
            logits = chunk_logits(tokens, head, out=buffer[: len(tokens)], chunk_bytes=budget)
            total += row_loss(logits, part, any(needs))
            for columns in _columns(weight, dtype, budget):
                slope = logits[:, columns]
                if to_hidden is not None:
                    to_hidden[part].addmm_(slope, weight[columns].to(dtype))
                if to_weight is not None:
                    to_weight[columns].addmm_(slope.T, tokens)
            if to_bias is not None:
                to_bias += logits.sum(0)
    return total, (to_hidden, to_weight, to_bias)


class _SelectedLogits(torch.autograd.Function):
    """Autograd's view of `selected_logits`: nothing of size V is held between forward and backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, indices, budget):
        ctx.save_for_backward(hidden, weight, bias, indices)
        ctx.budget = budget
        logits = hidden.new_empty(indices.shape, dtype=_precision(hidden, weight))
        for part, rows in _gathered(weight, indices, logits.dtype, budget):
            torch.bmm(rows, hidden[part].to(logits.dtype).unsqueeze(2), out=logits[part].unsqueeze(2))
        return logits if bias is None else logits.add_(bias[indices])

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden, weight, bias, indices = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad, upstream.dtype
        # summed in float32: a word that a thousand tokens select would stop growing in bfloat16
        to_hidden = torch.empty_like(hidden, dtype=dtype) if needs[0] else None
        to_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        to_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None
        for part, rows in _gathered(weight, indices, dtype, ctx.budget):  # rows: [n, K, D]
            slope = upstream[part].unsqueeze(2)  # [n, K, 1]
            if to_hidden is not None:
                torch.bmm(slope.mT, rows, out=to_hidden[part].unsqueeze(1))
            if to_weight is not None:
                outer = torch.mul(slope, hidden[part].to(dtype).unsqueeze(1), out=rows)
                to_weight.index_add_(0, indices[part].flatten(), outer.flatten(0, 1))
        if to_bias is not None:
            to_bias.index_add_(0, indices.flatten(), upstream.flatten())
        gradients = zip((to_hidden, to_weight, to_bias), (hidden, weight, bias), strict=True)
        return *(None if g is None else g.to(tensor.dtype) for g, tensor in gradients), None, None


def _gathered(weight: Tensor, indices: Tensor, dtype: torch.dtype, budget: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of tokens with their selected rows of the head, [n, K, D], which may be overwritten."""
    (N, K), D = indices.shape, weight.shape[1]
    tokens = max(1, min(N, budget // max(1, K * D * dtype.itemsize)))
    # one buffer for all blocks: an allocator that is asked for megabytes again and again keeps several of them
    buffer = weight.new_empty(tokens * K * D)
    for part in _blocks(N, tokens):
        chosen = indices[part]
        rows = torch.index_select(weight, 0, chosen.flatten(), out=_view(buffer, chosen.numel(), D))
        yield part, rows.to(dtype).view(*chosen.shape, D)


def _view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _ordered(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Descending values, ascending indices among equals."""
    indices, at = indices.sort(dim=-1)
    values, order = values.gather(-1, at).sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, order)


def _blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _columns(weight: Tensor, dtype: torch.dtype, budget: int) -> Iterator[slice]:
    """The whole vocabulary, or blocks of it where the head must be converted to `dtype`."""
    V, D = weight.shape
    return _blocks(V, V if weight.dtype == dtype else max(1, budget // (D * dtype.itemsize)))


def _precision(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _budget(tensor: Tensor, chunk_bytes: int | None, on_cpu: int) -> int:
    if chunk_bytes is None:
        return on_cpu if tensor.device.type == "cpu" else ACCELERATOR_BYTES
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive or None, got {chunk_bytes}")
    return chunk_bytes


def check_pair(student: Tensor, student_head: Head, teacher: Tensor, teacher_head: Head) -> None:
    """Raise ValueError unless student [N, Ds] and teacher [N, Dt] share tokens and vocabulary."""
    _check(student, student_head)
    _check(teacher, teacher_head)
    if len(student) != len(teacher):
        raise ValueError(f"student has {len(student)} tokens and teacher {len(teacher)}")
    if len(student_head.weight) != len(teacher_head.weight):
        raise ValueError(
            f"the student's head has {len(student_head.weight)} words and the teacher's "
            f"{len(teacher_head.weight)}: a loss that compares word by word needs one vocabulary"
        )


def _check(hidden: Tensor, head: Head) -> None:
    if hidden.ndim != 2 or head.weight.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and the head's weight [V, D], got {[*hidden.shape]} and "
            f"{[*head.weight.shape]}; select the trained tokens first: hidden[mask]"
        )


def _check_k(k: int, V: int) -> None:
    if not 1 <= k <= V:
        raise ValueError(f"k must lie in 1..V = {V}, got {k}")
