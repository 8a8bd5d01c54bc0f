"""A feed-forward layer that reads only what is active: faster decoding from exact zeros, without a predictor.

The idea. Decoding one token reads every weight once, so its time is the bytes. In a ReLU-fied gated layer the gate
projection already says which units speak; of W_up and W_down only their rows and columns are needed:

    s = FATReLU(W_gate x) [F]     A = {i : s_i ≠ 0}     y = Σ_{i ∈ A} s_i (W_up[i] · x) W_down[:, i]

At sparsity z this reads (1 + 2(1 − z)) / 3 of the bytes: the limit is 2.14 times the speed at 80 % and 2.5 at 90 %. The
gate itself must be read whole; going beyond takes a predictor, which the paper adds, at the price of errors.

Ours. `SparseFFN` stands in the place of the model's own module, with the same submodules: names, checkpoint and config
are unchanged. W_down is stored transposed, [F, D], so that its columns are contiguous; the parameter `down_proj.weight`
[D, F] becomes a view of that memory, so that nothing exists twice and nothing can go stale. `save_pretrained` writes
it in the usual layout.

    C kernel     one call per layer for float32 and bfloat16 on a CPU (`sparsekernel.py`)
    torch        elsewhere: index_select of the active rows, which copies them (embedding_bag does not: no faster)
    dense        prefill (more than `max_tokens` tokens), training, autocast, hooked projections; and with torch
                 operations, when more than DENSE_ABOVE of the units are active

The three agree to rounding, and where no unit is active y is exactly 0 (plus the bias). A weight that is infinite or
NaN spreads in a dense layer; here it does so only where it is read.

The paper's: the three-step operator (dense gate, fused up, sparse down) as CUDA kernels for a batch of one. Those
require d and F to be multiples of 256 and 32, drop gates equal to the threshold, and clear shared memory in a race;
here any shape works. Our choice: the layout, the small batches (the union of their active rows is read), the limits.

Measured on one AMD EPYC core of a shared machine, two runs, against the faster of two dense forms, at 80 % / 90 %
(`benchmarks/sparse_ffn.py`): the kernel is 1.7-2.1 / 2.2-2.4 times as fast at [576, 1536] in float32, 2.0 / 2.2-2.5 at
[2048, 8192], 1.9-2.2 / 2.5 at [4096, 11008], and more in bfloat16; torch operations 1.2-1.4 / 1.6-1.8. On a GPU,
finding A waits for the device; nothing was measured there.

Cost of installing: one transposition of W_down per layer, memory of one W_down for a moment.

Paper: Song, Han, Zhang et al., "ProSparse", COLING 2025, arXiv 2402.13516, section 4.3. Official operators:
github.com/Raincleared-Song/sparse_gpu_operator, commit 1f0b9af (no licence file: read, not copied).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from residency.compress.decoder import decoder
from residency.compress.relufy import PARTS, FATReLU, gated_ffns, thresholds
from residency.compress.sparsekernel import Kernel, kernel
from residency.errors import MissingError, PlanError
from residency.modes import evaluating

MAX_TOKENS = 4
"""Tokens in one forward pass up to which the sparse path is taken: more of them have more active rows in common.
Measured, see benchmarks/sparse_ffn.py."""
DENSE_ABOVE = 0.35
"""Share of active units above which torch operations compute densely, for gathering copies what it reads. Measured."""


class SparseFFN(nn.Module):
    """A gated feed-forward module that skips silent units when few tokens pass.

    Args:
        ffn: The module to stand in for; its submodules are taken over, not copied.
        use: "auto" takes the C kernel where it runs; "c" insists on it; "torch" does without.
        max_tokens: Tokens per forward pass up to which the sparse path is taken.

    Raises:
        PlanError: When the module computes something else than down(act(gate(x)) * up(x)), its activation is not ReLU
            or FATReLU, or its projections are not plain linear layers.
        MissingError: For use="c" without a kernel.
    """

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Any

    def __init__(self, ffn: Any, use: Literal["auto", "c", "torch"] = "auto", max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = ffn.gate_proj, ffn.up_proj, ffn.down_proj
        self.act_fn, self.max_tokens = ffn.act_fn, max_tokens
        self.training = ffn.training
        self.replaced: list[Any] = []
        self._projections: tuple[Any, ...] = (self.gate_proj, self.up_proj, self.down_proj)
        self._check(ffn)
        self._compiled = use != "torch" and all(p.bias is None for p in self._projections) and kernel() is not None
        if use == "c" and not self._compiled:
            raise MissingError(
                "the C kernel cannot be used here",
                hint='it needs a C compiler and projections without bias; use="auto" does without where it must',
            )
        self.lay_out()

    def lay_out(self) -> None:
        """Store W_down transposed behind an unchanged parameter; again after weights were exchanged."""
        with torch.no_grad():
            self.down_proj.weight.data = self.down_proj.weight.data.t().contiguous().t()

    @property
    def threshold(self) -> float:
        """The threshold t of the activation, 0 for ReLU."""
        return getattr(self.act_fn, "threshold", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        tokens = x.numel() // max(1, x.shape[-1])
        if not 0 < tokens <= self.max_tokens or self._needs_dense(x):
            return self.dense(x)
        flat = x.reshape(tokens, x.shape[-1])
        gate, up, down = (projection.weight for projection in self._projections)
        if self._compiled and x.device.type == "cpu" and x.dtype == gate.dtype and x.dtype in Kernel.dtypes:
            run = kernel()  # not an attribute: a module is copied and pickled, a C function is not
            if run is not None:
                return run(flat, gate, up, down.t(), self._rounded(x.dtype)).view(x.shape)
        return self._gathered(flat).view(x.shape)

    def dense(self, x: Tensor) -> Tensor:
        """The module it stands in for: every weight is read."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def extra_repr(self) -> str:
        """Which path is taken, for `print(model)`."""
        return f"{'C kernel' if self._compiled else 'torch'}, max_tokens={self.max_tokens}"

    def _needs_dense(self, x: Tensor) -> bool:
        """Whether autograd, autocast or a hook has to see every product, or projections or layout were exchanged."""
        gate, up, down = self._projections
        if self.gate_proj is not gate or self.up_proj is not up or self.down_proj is not down:  # an adapter came
            return True
        weight = down.weight
        hooks = gate._forward_hooks or up._forward_hooks or down._forward_hooks
        before = gate._forward_pre_hooks or up._forward_pre_hooks or down._forward_pre_hooks
        return bool(
            (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            or hooks
            or before
            or torch.is_autocast_enabled(x.device.type)
            or not weight.t().is_contiguous()
            or not gate.weight.is_contiguous()
            or not up.weight.is_contiguous()
        )

    def _gathered(self, x: Tensor) -> Tensor:
        """The sparse path in torch operations; x [B, D]."""
        gates = self.act_fn(self.gate_proj(x))
        active = (gates[0] if len(x) == 1 else gates.any(0)).nonzero().squeeze(1)
        if len(active) > DENSE_ABOVE * gates.shape[1]:
            return self.down_proj(gates * self.up_proj(x))
        up, down = self.up_proj.weight.index_select(0, active), self.down_proj.weight.t()
        bias = None if self.up_proj.bias is None else self.up_proj.bias[active]
        y = (gates[:, active] * functional.linear(x, up, bias)) @ down.index_select(0, active)
        return y if self.down_proj.bias is None else y + self.down_proj.bias

    def _rounded(self, dtype: torch.dtype) -> float:
        """The threshold as a comparison in this dtype sees it."""
        t = self.threshold
        return t if dtype == torch.float32 or not t else float(torch.tensor(t, dtype=dtype))

    def _check(self, ffn: Any) -> None:
        """Raise PlanError unless the module is one whose units can be skipped."""
        if not isinstance(self.act_fn, nn.ReLU | FATReLU):
            raise PlanError(
                f"the activation is {type(self.act_fn).__name__}, which is never exactly zero",
                hint="relufy(model) first, and train it (the recipe step `sparsify` does both)",
            )
        for name, projection in zip(PARTS, self._projections, strict=False):
            if type(projection) is not nn.Linear or projection.weight.is_meta:
                raise PlanError(
                    f"{name} is a {type(projection).__name__}, and rows are read from plain linear layers in memory",
                    hint="merge adapters, undo quantisation and offloading first",
                )
        weight = self.gate_proj.weight
        probe = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None, None]
        with torch.no_grad(), evaluating(ffn):
            if not torch.equal(ffn(probe), self.dense(probe)):
                raise PlanError(
                    f"a {type(ffn).__name__} is not down(act(gate(x)) * up(x)), so units cannot be skipped in it",
                    hint="keep the model's own modules",
                )


def install_sparse_ffn(model: Any, use: Literal["auto", "c", "torch"] = "auto", max_tokens: int = MAX_TOKENS) -> Any:
    """Let every gated layer of a ReLU-fied model skip its silent units when it decodes.

    Args:
        model: A transformers causal language model; changed in place, its checkpoint is not. Twice is once.
        use: See `SparseFFN`.
        max_tokens: See `SparseFFN`.

    Returns:
        The model.

    Raises:
        PlanError: When the model's activation is never zero, or its modules are not plain gated layers; nothing is
            changed then.
    """
    thresholds(model)
    try:
        for layer, name, own in _places(model):
            if not isinstance(own, SparseFFN):
                ffn = SparseFFN(own, use, max_tokens)
                ffn.replaced = [own]  # in a list: not a submodule
                setattr(layer, name, ffn)
    except BaseException:
        remove_sparse_ffn(model)
        raise
    return model


def remove_sparse_ffn(model: Any) -> Any:
    """Put the model's own modules back, with W_down in its usual layout; activations changed since are kept."""
    for layer, name, ffn in _places(model):
        if isinstance(ffn, SparseFFN):
            own = ffn.replaced[0]
            own.act_fn = ffn.act_fn
            own.train(ffn.training)
            setattr(layer, name, own)
            with torch.no_grad():
                own.down_proj.weight.data = own.down_proj.weight.data.contiguous()
    return model


@contextlib.contextmanager
def sparse_decoding(model: Any, use: Literal["auto", "c", "torch"] = "auto") -> Iterator[Any]:
    """`install_sparse_ffn` for the length of a block."""
    install_sparse_ffn(model, use)
    try:
        yield model
    finally:
        remove_sparse_ffn(model)


def _places(model: Any) -> list[tuple[nn.Module, str, Any]]:
    """Parent, attribute name and module of every gated layer."""
    ffns = {id(ffn): ffn for ffn in gated_ffns(model)}
    return [
        (parent, name, child)
        for layer in decoder(model)[1]
        for parent in layer.modules()
        for name, child in parent.named_children()
        if id(child) in ffns
    ]
