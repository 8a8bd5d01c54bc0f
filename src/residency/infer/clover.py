"""Clover and Clover-2: a draft head that reads its own guesses.

Medusa's heads guess the next tokens independently of each other. Clover feeds every guessed token back in, so that the
second guess knows the first. A small recurrent cell, the attention decoder, joins a state h with the embedding e of a
token; per attention head j it is a gate, without softmax and without output projection:

    q = W_q · RMSNorm(h) + b_q      k = W_k · e + b_k      v = W_v · e + b_v
    AD(h, e) = h + concat_j( cos(q_j, k_j) · v_j )

With h_t the target's state before its final norm, x_{t+1} the token already known, and Aug a stack of causal decoder
layers with a cache of their own (started as copies of the target's last layer):

    Clover-2    s¹ = RMSNorm_c(Aug(AD₁(h_t, e(x_{t+1}))))      o¹ = RMSNorm_o(FC₁ s¹)
                sⁱ = AD₂(sⁱ⁻¹, e(x_{t+i}))                     oⁱ = RMSNorm_o(FC₂ [sⁱ; e(x_{t+i})])        i ≥ 2
    Clover      sⁱ = AD(sⁱ⁻¹, e(x_{t+i})),  s⁰ = Aug(h_t)      oⁱ = RMSNorm_o(sⁱ' + SiLU(Wᵢ sⁱ')),  sⁱ' = sⁱ

and the target's own frozen LM head turns oⁱ into the distribution of x_{t+1+i}. e(x) is a row of that head.

The paper's: all of Clover-2 (read in the official code). Clover's exact wiring is not public; that its augmenting block
comes first, has one layer and that its output projections are residual blocks is reported, the rest is our choice, as
is the norm before the head. Initial noise is drawn from ±0.01 (the official code's `uniform_(b=0.01)` draws from
(0, 0.01) only). Guesses may be restricted to a draft vocabulary (see `drafter.py`), which is ours.

Cost: for D = 576 Clover-2 has 10 million parameters; per step one pass of two layers over the accepted tokens, and per
level one cell and V' rows of the head for every node.

Papers: Xiao et al., "Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge", 2024, arXiv
2405.00263; Xiao, Gui, Su, Chen, "Clover-2: Accurate Inference for Regressive Lightweight Speculative Decoding", 2024,
arXiv 2408.00264. Official code (Clover-2 only): github.com/XiaoBin1992/clover, commit 9d37214.

Relations: `medusa.Medusa` is the baseline without memory; `draftloss.DraftLoss` trains all of them;
`drafted.Drafted` decodes with them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from residency.errors import PlanError
from residency.infer.drafter import Drafter, final_norm
from residency.infer.slotcache import tree_mask
from residency.step import Params

NOISE = 0.01
"""Initial weights lie this close to the identity (official code, `_init_clover_head`)."""


class CloverParams(Params):
    """What a Clover drafter is made of."""

    heads: int = Field(5, ge=1)
    """How many tokens ahead it is trained to guess (the paper's Clover-2: 5)."""
    layers: int = Field(2, ge=1)
    """Decoder layers of the augmenting block (the paper: 2 in Clover-2, 1 in Clover)."""


class AttentionDecoder(nn.Module):
    """AD(h, e): add to a state what a token contributes, gated per head by a cosine.

    Args:
        width: D.
        heads: Gates; D is split evenly among them.
        eps: Of the norm and of the cosine.
    """

    def __init__(self, width: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{width} dimensions cannot be split among {heads} heads")
        self.heads, self.eps = heads, eps
        self.norm = nn.RMSNorm(width, eps=eps)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        for projection, near in ((self.query, 1.0), (self.key, 1.0), (self.value, 0.0)):
            _near_identity(projection, near)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """States [..., D] and token embeddings [..., D] → states [..., D]."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (self.query(self.norm(h)), self.key(e), self.value(e)))
        gate = nn.functional.cosine_similarity(q, k, dim=-1, eps=self.eps)
        return h + (gate[..., None] * v).flatten(-2)


class Regressive(Drafter):
    """What both Clovers share: an augmenting block over certain tokens, and a cell over guessed ones."""

    Params = CloverParams

    def __init__(self, target: PreTrainedModel, params: CloverParams, token_ids: Tensor | None = None) -> None:
        super().__init__(token_ids)
        config, norm = target.config.get_text_config(), final_norm(target)
        self.width, self.heads, self.context = config.hidden_size, params.heads, params.layers
        self.eps = float(getattr(config, "rms_norm_eps", 1e-6))
        last: Any = target.get_decoder().layers[-1]
        self.augment = nn.ModuleList(type(last)(config, i) for i in range(params.layers))
        for layer in self.augment:
            layer.to(next(last.parameters())).load_state_dict(last.state_dict())
        self.norm_out = copy.deepcopy(norm)
        self.pads: list[int] = []
        self._gates = config.num_attention_heads if self.width % config.num_attention_heads == 0 else 1

    def fit_check(self, width: int, vocabulary: int) -> None:
        """See `Drafter.fit_check`."""
        super().fit_check(width, vocabulary)
        if width != self.width:
            raise PlanError(f"the draft is {self.width} wide, and the model {width}", hint="train the draft again")

    # what Clover and Clover-2 differ in

    def enter(self, h: Tensor, e: Tensor) -> Tensor:
        """What the augmenting block reads."""
        raise NotImplementedError("abstract: before the augmenting block")

    def leave(self, x: Tensor, e: Tensor) -> Tensor:
        """What the augmenting block has written → s¹."""
        raise NotImplementedError("abstract: after the augmenting block")

    def cell(self, s: Tensor, e: Tensor) -> Tensor:
        """sⁱ from sⁱ⁻¹ and the embedding of the token between them."""
        raise NotImplementedError("abstract: the recurrent cell")

    def project(self, i: int, s: Tensor, e: Tensor) -> Tensor:
        """oⁱ, i counted from 0; `e` is the embedding the state was made with (not read for i = 0)."""
        raise NotImplementedError("abstract: the output projection")

    # ------------------------------------------------------------------ training

    def unroll(self, hidden: Tensor, following: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """All heads over whole texts, guessed tokens replaced by the true ones.

        Args:
            hidden: [B, T, D] of the target before its final norm.
            following: [B, T + heads − 1] ids: column t + i is x_{t+1+i}.
            mask: [B, T] bool, False at padding; None without padding.

        Yields:
            oⁱ [B, T, D] for i = 0, 1, …: at t it predicts x_{t+2+i}.
        """
        T = hidden.shape[1]
        e = self.embed(following[:, :T])
        positions = torch.arange(T, device=hidden.device)[None]
        inner = torch.ones(T, T, dtype=torch.bool, device=hidden.device).tril()[None].expand(len(hidden), -1, -1)
        seen = inner if mask is None else inner & mask[:, None, :].bool()
        additive = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
        additive = additive.masked_fill_(~seen, torch.finfo(hidden.dtype).min)[:, None]
        s = self.leave(self._augmented(self.enter(hidden, e), additive, positions, None), e)
        yield self.project(0, s, e)
        for i in range(1, self.heads):
            e = self.embed(following[:, i : i + T])
            s = self.cell(s, e)
            yield self.project(i, s, e)

    def _augmented(self, x: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        rope = self.target.get_decoder().rotary_emb(x, positions)
        for layer in self.augment:
            x = layer(
                x,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rope,
                past_key_values=cache,
                use_cache=cache is not None,
            )
            x = x[0] if isinstance(x, tuple) else x
        return x

    # ------------------------------------------------------------------ decoding

    def observe(self, hidden: Tensor, following: Tensor, counts: Sequence[int], pads: Sequence[int]) -> None:
        """See `Drafter.observe`."""
        assert self.cache is not None
        B, A, _ = hidden.shape
        device, lengths = hidden.device, self.cache.lengths
        if not max(lengths):
            self.pads = list(pads)
        e = self.embed(following)
        x, mask = self.enter(hidden, e), None
        offset = torch.tensor([length - pad for length, pad in zip(lengths, self.pads, strict=True)], device=device)
        positions = (offset[:, None] + torch.arange(A, device=device)).clamp_min(0)
        if max(lengths) or any(self.pads):  # otherwise a plain causal pass, for which attention has a fast path
            end = max(lengths) + A
            seen = torch.arange(end, device=device) >= torch.tensor(self.pads, device=device)[:, None]
            own = torch.ones(A, A, dtype=torch.bool, device=device).tril().expand(B, -1, -1)
            if not max(lengths):
                own = own & seen[:, None, :]
            mask = tree_mask(seen, lengths, own, hidden.dtype)
        s = self.leave(self._augmented(x, mask, positions, self.cache), e)
        self.cache.advance(counts)
        last = torch.tensor([n - 1 for n in counts], device=device)
        self._root = s[torch.arange(B, device=device), last][:, None]

    def first(self) -> tuple[Tensor, Any]:
        """See `Drafter.first`."""
        return self.logits(self.project(0, self._root, self._root)), (0, self._root)

    def next(self, state: Any, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        """See `Drafter.next`."""
        i, s = state
        s = s.gather(1, parents[..., None].expand(-1, -1, s.shape[-1]))
        e = self.embed(tokens)
        s = self.cell(s, e)
        i = min(i + 1, self.heads - 1)
        return self.logits(self.project(i, s, e)), (i, s)


class Clover2(Regressive):
    """Clover-2.

    Args:
        target: The model to draft for; its last layer and its final norm are copied as a beginning.
        params: Sizes.
        token_ids: [V'] draft vocabulary, or None for all tokens.
    """

    def __init__(self, target: PreTrainedModel, params: CloverParams | None = None, token_ids: Tensor | None = None):
        super().__init__(target, params or CloverParams(), token_ids)
        D = self.width
        self.before, self.recur = (AttentionDecoder(D, self._gates, self.eps) for _ in range(2))
        self.norm_context = copy.deepcopy(self.norm_out)
        self.fc1, self.fc2 = nn.Linear(D, D, bias=False), nn.Linear(2 * D, D, bias=False)
        _near_identity(self.fc1, 1.0)
        _near_identity(self.fc2, 1.0)
        self.requires_grad_(True)

    def enter(self, h: Tensor, e: Tensor) -> Tensor:
        """See `Regressive.enter`."""
        return self.before(h, e)

    def leave(self, x: Tensor, e: Tensor) -> Tensor:
        """See `Regressive.leave`."""
        return self.norm_context(x)

    def cell(self, s: Tensor, e: Tensor) -> Tensor:
        """See `Regressive.cell`."""
        return self.recur(s, e)

    def project(self, i: int, s: Tensor, e: Tensor) -> Tensor:
        """See `Regressive.project`."""
        return self.norm_out(self.fc2(torch.cat((s, e), -1)) if i else self.fc1(s))


class Clover(Regressive):
    """Clover, as far as it is public.

    Args:
        target: The model to draft for; its last layer and its final norm are copied as a beginning.
        params: Sizes; the paper's Clover has one layer.
        token_ids: [V'] draft vocabulary, or None for all tokens.
    """

    def __init__(self, target: PreTrainedModel, params: CloverParams | None = None, token_ids: Tensor | None = None):
        super().__init__(target, params or CloverParams(layers=1), token_ids)
        self.recur = AttentionDecoder(self.width, self._gates, self.eps)
        self.blocks = nn.ModuleList(ResidualBlock(self.width) for _ in range(self.heads))
        self.requires_grad_(True)

    def enter(self, h: Tensor, e: Tensor) -> Tensor:
        """See `Regressive.enter`."""
        return h

    def leave(self, x: Tensor, e: Tensor) -> Tensor:
        """See `Regressive.leave`."""
        return self.recur(x, e)

    def cell(self, s: Tensor, e: Tensor) -> Tensor:
        """See `Regressive.cell`."""
        return self.recur(s, e)

    def project(self, i: int, s: Tensor, e: Tensor) -> Tensor:
        """See `Regressive.project`."""
        return self.norm_out(self.blocks[i](s))


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), W and b zero at first (Medusa's head)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return x + nn.functional.silu(self.linear(x))


def _near_identity(linear: nn.Linear, scale: float) -> None:
    """W = scale · [I | 0] + U(−0.01, 0.01), bias 0."""
    with torch.no_grad():
        linear.weight.uniform_(-NOISE, NOISE)
        diagonal = torch.arange(linear.out_features)
        linear.weight[diagonal, diagonal] += scale
        if linear.bias is not None:
            linear.bias.zero_()
