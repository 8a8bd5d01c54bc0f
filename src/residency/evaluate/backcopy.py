"""The Bigram-Backcopy task and a transformer small enough to watch attention sinks being born.

Texts over V - 1 characters behind a start token ⟨s⟩. A few frequent characters are *triggers* 𝒯:

    x_0 = ⟨s⟩,    x_1 ~ π restricted to characters outside 𝒯,
    x_n = x_{n-2}              if x_{n-1} ∈ 𝒯       (copy back the character before the trigger)
    x_n ~ P[x_{n-1}, ·]        otherwise             (a bigram)

with π and P counted in any text. Everything is known exactly: the conditional distribution, hence the risk of a model
(its expected cross-entropy, not a sampled one), and the entropy. With m_n[a] the probability that x_n = a and a ∉ 𝒯,

    m_0 = ⟨s⟩,    m_n[c] = Σ_a m_{n-1}[a] P[a, c] + m_{n-2}[c] Σ_{b ∈ 𝒯} P[c, b]        for c ∉ 𝒯
    nats of T tokens = Σ_{n < T-1} Σ_a m_n[a] H(P[a, ·])

A character that the text continues by triggers only is repeated for ever, so there may be no stationary distribution
but several, and the entropy per token depends on the length.

A model with one layer learns the bigrams in its feed-forward part and the copy in its attention. After a trigger the
head looks one place back (active). Elsewhere whatever it writes only disturbs the bigram, so it looks at ⟨s⟩ (dormant:
the sink), and ⟨s⟩'s value state drains. With three layers, the residual stream of ⟨s⟩ grows. ReLU attention, whose
weights need not add up to one, has no use for a sink.

`TinyTransformer` is the paper's: pre-LayerNorm, learned positions, one head, feed-forward of 4 D with ReLU, no biases,
output apart from the embedding, N(0, 1) embeddings. ReLU attention is relu(q·k / √D) / n at the n-th query, counted
from 1. Parts of it can be left out layer by layer. It trains in any loop; the paper's setting is AdamW, learning rate
3e-4 (SGD: 0.03, momentum 0.9), betas 0.9, 0.99, weight decay 1e-4, 512 texts of 256 tokens per step, plain
cross-entropy.

Our choice: the exact conditional at position 0 (the paper's oracle takes π), no unused delimiter token, a character
that never has a successor goes on by π, query 0 (which can only see itself) left out of the attention means, ‖W_O V‖.

Cost: a text of T tokens takes T vector operations for the whole batch; the paper's code draws one token at a time.

Source: Guo et al., "Active-Dormant Attention Heads", NeurIPS 2024 workshop M3L, arXiv 2410.13835. Official code:
GuoTianYu2000/Active-Dormant-Attention (commit 16b3593, no licence; read for facts).

Relations: `sinkdynamics` is this task reduced to two variables; `ablate` works on `TinyTransformer`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn


class BigramBackcopy:
    """The task: draws texts and knows their distribution.

    Args:
        text: Where π and P are counted.
        triggers: The trigger characters, or how many of the most frequent ones.

    Attributes:
        characters: Sorted; their place is their token id. V = len(characters) + 1.
        start: Token id of ⟨s⟩, V - 1.
        triggers: [K] token ids.
        unigram: [V] π, 0 at ⟨s⟩, float64.
        bigram: [V, V] P; row ⟨s⟩ is π restricted to characters outside 𝒯.

    Raises:
        ValueError: When the text has fewer than two characters outside 𝒯, or lacks a trigger.
    """

    def __init__(self, text: str, triggers: int | str = 3) -> None:
        counts = Counter(text)
        self.characters = "".join(sorted(counts))
        if isinstance(triggers, int):
            triggers = "".join(c for c, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:triggers])
        if missing := set(triggers) - set(counts):
            raise ValueError(f"the text has no {sorted(missing)[0]!r} to be a trigger")
        if len(counts) - len(set(triggers)) < 2:
            raise ValueError("the text needs at least two different characters that are no triggers")
        place = {c: i for i, c in enumerate(self.characters)}
        self.start = len(counts)
        self.triggers = torch.tensor(sorted(place[c] for c in set(triggers)), dtype=torch.long)
        self.unigram = torch.zeros(self.vocabulary, dtype=torch.float64)
        for c, n in counts.items():
            self.unigram[place[c]] = n / len(text)
        self.bigram = torch.zeros(self.vocabulary, self.vocabulary, dtype=torch.float64)
        for (a, b), n in Counter(pairwise(text)).items():
            self.bigram[place[a], place[b]] = n
        dead = self.bigram.sum(1) == 0
        self.bigram[dead] = self.unigram
        self.bigram[self.start, self.triggers] = 0
        self.bigram /= self.bigram.sum(1, keepdim=True)

    @property
    def vocabulary(self) -> int:
        """V, ⟨s⟩ included."""
        return self.start + 1

    def is_trigger(self, ids: Tensor) -> Tensor:
        """Which token ids are triggers, same shape."""
        return torch.isin(ids, self.triggers.to(ids.device))

    def sample(self, rows: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw texts: [rows, length] token ids, the first of each ⟨s⟩."""
        cumulative = self.bigram.cumsum(1)
        cumulative[:, -1] = 1.0 + 1e-9
        last = (self.bigram > 0).long().flip(1).argmax(1)  # rounding must not lead to an impossible character
        last = self.vocabulary - 1 - last
        x = torch.full((rows, length), self.start)
        draws = torch.rand(length, rows, dtype=torch.float64, generator=generator)
        for n in range(1, length):
            before = x[:, n - 1]
            drawn = torch.searchsorted(cumulative[before], draws[n][:, None], right=True)[:, 0]
            drawn = torch.minimum(drawn, last[before])
            x[:, n] = torch.where(self.is_trigger(before), x[:, n - 2], drawn) if n > 1 else drawn
        return x

    def conditional(self, x: Tensor) -> Tensor:
        """[B, T, V] distribution of the token after each of x's [B, T]."""
        after = self.bigram.to(x.device)[x]
        back = nn.functional.one_hot(x.roll(1, 1), self.vocabulary).to(after.dtype)
        return torch.where(self.is_trigger(x)[..., None], back, after)

    def risk(self, logits: Tensor, x: Tensor) -> dict[str, float]:
        """Expected cross-entropy in nats of predictions [B, T, V] after x [B, T]: where copying, and elsewhere."""
        p = self.conditional(x)
        nats = -torch.where(p > 0, p * logits.double().log_softmax(-1), 0.0).sum(-1)
        copying = self.is_trigger(x)
        return {"backcopy_risk": float(nats[copying].mean()), "bigram_risk": float(nats[~copying].mean())}

    def entropy(self, length: int) -> tuple[float, float]:
        """What a perfect model pays on texts of `length` tokens, in expectation.

        Returns:
            Nats per predicted token (the entropy rate, for a long text), and nats per prediction after ⟨s⟩ or a
            character outside 𝒯 (predictions after a trigger cost nothing).
        """
        if length < 2:
            raise ValueError(f"a text of {length} tokens has nothing to predict")
        nats = torch.special.entr(self.bigram).sum(1)
        back = self.bigram[:, self.triggers].sum(1)
        forward = self.bigram.clone()
        forward[:, self.triggers] = 0
        before, now = torch.zeros_like(back), torch.zeros_like(back)
        now[self.start] = 1.0
        total = bigrams = 0.0
        for _ in range(length - 1):
            total, bigrams = total + float(now @ nats), bigrams + float(now.sum())
            before, now = now, now @ forward + before * back
        return total / (length - 1), total / bigrams


@dataclass(frozen=True)
class TinyConfig:
    """Sizes and parts of a `TinyTransformer`.

    Args:
        vocabulary: V.
        layers: 1 or 3 in the paper.
        width: D; the feed-forward part has 4 D.
        length: Longest text.
        attention: "softmax" or "relu".
        without_attention, without_mlp: Layers that lack the part.
        linear_mlp: Layers whose feed-forward part is one linear map.
    """

    vocabulary: int
    layers: int = 1
    width: int = 256
    length: int = 256
    attention: Literal["softmax", "relu"] = "softmax"
    without_attention: tuple[int, ...] = ()
    without_mlp: tuple[int, ...] = ()
    linear_mlp: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.attention not in ("softmax", "relu"):
            raise ValueError(f"attention is softmax or relu, got {self.attention!r}")
        named = (*self.without_attention, *self.without_mlp, *self.linear_mlp)
        if bad := [i for i in named if not 0 <= i < self.layers]:
            raise ValueError(f"there is no layer {bad[0]}: the model has layers 0 to {self.layers - 1}")


class Attention(nn.Module):
    """One causal head; returns what it writes [B, T, D] and its weights [B, T, T]."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.kind, self.head_dim = config.attention, config.width
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )

    def forward(self, hidden: Tensor, trace: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Attend; `trace` takes the logits [B, T, T] and ‖W_O V‖ [B, T]."""
        T = hidden.shape[1]
        logits = self.q_proj(hidden) @ self.k_proj(hidden).transpose(1, 2) / self.head_dim**0.5
        ahead = torch.ones(T, T, dtype=torch.bool, device=hidden.device).triu(1)
        masked = logits.masked_fill(ahead, -torch.inf)
        if self.kind == "softmax":
            weights = masked.softmax(-1)
        else:
            weights = masked.relu() / torch.arange(1, T + 1, device=hidden.device, dtype=hidden.dtype)[:, None]
        v = self.v_proj(hidden)
        if trace is not None:
            trace |= {"logits": logits, "weights": weights, "written": self.o_proj(v).norm(dim=-1)}
        return self.o_proj(weights @ v), weights


class Block(nn.Module):
    """x + attention(LN x), then + feed-forward(LN x); parts that a layer lacks write nothing."""

    def __init__(self, config: TinyConfig, index: int) -> None:
        super().__init__()
        D = config.width
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.self_attn = None if index in config.without_attention else Attention(config)
        self.mlp: nn.Module | None
        if index in config.without_mlp:
            self.mlp = None
        elif index in config.linear_mlp:
            self.mlp = nn.Linear(D, D, bias=False)
        else:
            self.mlp = nn.Sequential(nn.Linear(D, 4 * D, bias=False), nn.ReLU(), nn.Linear(4 * D, D, bias=False))

    def forward(self, hidden: Tensor, trace: dict[str, Tensor] | None = None) -> Tensor:
        """One layer on [B, T, D]."""
        if self.self_attn is not None:
            hidden = hidden + self.self_attn(self.input_layernorm(hidden), trace)[0]
        if self.mlp is not None:
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        if trace is not None:
            trace["residual"] = hidden.norm(dim=-1)
        return hidden


class TinyTransformer(nn.Module):
    """Token ids [B, T] → logits [B, T, V]."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, x: Tensor, trace: list[dict[str, Tensor]] | None = None) -> Tensor:
        """Predict; `trace` takes per layer what `measures` reads."""
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for layer in self.layers:
            seen: dict[str, Tensor] | None = None if trace is None else {}
            hidden = layer(hidden, seen)
            if trace is not None and seen is not None:
                trace.append(seen)
        return self.output(self.norm(hidden))


@torch.no_grad()
def measures(model: TinyTransformer, task: BigramBackcopy, x: Tensor) -> dict[str, Any]:
    """The three phenomena and the risks on texts x [B, T].

    Returns:
        backcopy_risk, bigram_risk; and `layers`, per layer: residual (mean ‖r‖ of ⟨s⟩), residual_ratio (others' = 1)
        and, where it has attention: sink, sink_at_triggers (attention on ⟨s⟩ of queries outside and inside 𝒯), gap,
        gap_sd (logit of ⟨s⟩ less the mean of the others: mean and deviation over the query's characters outside 𝒯),
        value (‖W_O V‖ of ⟨s⟩) and value_ratio (others' = 1).
    """
    trace: list[dict[str, Tensor]] = []
    found: dict[str, Any] = task.risk(model(x, trace), x)
    trigger = task.is_trigger(x)[:, 1:]
    found["layers"] = [_layer(seen, x, trigger) for seen in trace]
    return found


def _layer(seen: dict[str, Tensor], x: Tensor, trigger: Tensor) -> dict[str, float]:
    residual = seen["residual"].double()
    found = {"residual": float(residual[:, 0].mean())}
    found["residual_ratio"] = found["residual"] / float(residual[:, 1:].mean())
    if "weights" not in seen:
        return found
    sink = seen["weights"][:, 1:, 0].double()
    found["sink"], found["sink_at_triggers"] = float(sink[~trigger].mean()), float(sink[trigger].mean())
    logits = seen["logits"].double()
    others = logits.tril()[:, 1:, 1:].sum(-1) / torch.arange(1, x.shape[1], device=x.device)
    gap = logits[:, 1:, 0] - others
    by_character = torch.stack([gap[x[:, 1:] == c].mean() for c in x[:, 1:][~trigger].unique()])
    found["gap"], found["gap_sd"] = float(by_character.mean()), float(by_character.std(unbiased=False))
    written = seen["written"].double()
    found["value"] = float(written[:, 0].mean())
    found["value_ratio"] = found["value"] / float(written[:, 1:].mean())
    return found
