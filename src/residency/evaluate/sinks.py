"""Attention sinks, value drain and residual peaks of a language model, per layer and head, without touching its logits.

In most decoders the first token of a text is not read for what it says. Many heads send it the attention they have no
use for (the *sink*), it answers with a value close to nothing (the *drain*), and its residual stream is orders of
magnitude longer than that of any other token in the middle layers (the *peak*). A head that rests on the sink for one
kind of text and works on another is *dormant* on the first and *active* on the second.

For layer l and head h, texts of tokens 0 … n, attention A, attention logits a and value states V:

    sink mass        mean over queries n ≥ n₀ of A[n, 0]
    logit gap        mean over n ≥ n₀ of  a[n, 0] − mean_{0 < j ≤ n} a[n, j]
    value ratio      mean ‖W_O^h V_0‖ / mean_{j > 0} ‖W_O^h V_j‖        (key/value head of h under GQA)
    residual ratio   mean ‖r_0‖ / mean_{j > 0} ‖r_j‖                    (before the first layer and after each)

Means run over all real tokens of all texts of a domain, so batch size, padding and order change nothing. Token 0 is the
first of the row, whatever it is: the sink follows the place and not a special token, which the mass of the next places
shows.

The queries and keys are those that the model's own projections return, seen by hooks; RoPE, norms of queries and keys,
soft-capping and sliding windows are applied as the family does. Attention runs on as it was (sdpa, eager), nothing is
returned to it: the logits stay bit for bit the same.

The paper's: the three phenomena and the two measured on Llama. Our choice: n₀ = 8 (early queries have little else to
attend to), a head counts as dormant above a mass of 0.5, ratios of means.

Cost: the q·K products once more, in float32, in blocks of queries that hold at most `BLOCK` numbers; the rest is
small beside a forward pass. Memory does not grow with the number of texts.

Source: Guo, Pai, Bai, Jiao, Jordan, Mei, "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token
Phenomena in LLMs", NeurIPS 2024 workshop M3L, arXiv 2410.13835. Official code: GuoTianYu2000/Active-Dormant-Attention
(commit 16b3593, no licence; read for facts). Sinks: Xiao et al. 2023, arXiv 2309.17453; peaks: Sun et al. 2024, arXiv
2402.17762.

Inputs: token ids, grouped by domain. Relations: `ablate` switches parts off and shows what writes the peak;
`sinkcosts` measures what it means for cache eviction and quantisation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from residency.errors import DataError, PlanError
from residency.evaluate.textstarts import Starts, decoder_layers, first_tensor
from residency.modes import evaluating

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Values of `model_type` whose attention is known here."""
DORMANT = 0.5
"""Sink mass above which a head counts as dormant; our choice."""
BLOCK = 1 << 24
"""Attention logits held at once, in numbers (64 MiB)."""


@dataclass(frozen=True)
class SinkMap:
    """What was measured on the texts of one domain; L layers, H query heads.

    Args:
        mass: [L, H, P] attention on the tokens at the first P places; place 0 is the sink.
        gap: [L, H] logit gap.
        value_first, value_others: [L, H] mean norms of W_O^h V.
        residual_first, residual_others: [L + 1] mean norms of the residual stream, the first before layer 0.
        rows, tokens, queries: What the means run over.
        domain: Name of the texts.
    """

    mass: Tensor
    gap: Tensor
    value_first: Tensor
    value_others: Tensor
    residual_first: Tensor
    residual_others: Tensor
    rows: int
    tokens: int
    queries: int
    domain: str = ""

    @property
    def sink_mass(self) -> Tensor:
        """[L, H] attention on the first token."""
        return self.mass[..., 0]

    @property
    def value_ratio(self) -> Tensor:
        """[L, H] norm of the first token's value state as written to the residual stream, others' = 1."""
        return self.value_first / self.value_others

    @property
    def residual_ratio(self) -> Tensor:
        """[L + 1] norm of the first token's residual stream, others' = 1."""
        return self.residual_first / self.residual_others

    @property
    def share(self) -> float:
        """Attention on the first token, over all heads."""
        return float(self.sink_mass.mean())

    def dormant(self, threshold: float = DORMANT) -> list[tuple[int, int]]:
        """(layer, head) of the heads whose sink mass is above `threshold`."""
        return [(int(layer), int(head)) for layer, head in (self.sink_mass > threshold).nonzero()]

    def table(self) -> list[dict[str, float]]:
        """One row per head: layer, head, sink_mass, logit_gap, value_ratio, residual_ratio (after the layer)."""
        return [
            {
                "layer": layer,
                "head": head,
                "sink_mass": float(self.sink_mass[layer, head]),
                "logit_gap": float(self.gap[layer, head]),
                "value_ratio": float(self.value_ratio[layer, head]),
                "residual_ratio": float(self.residual_ratio[layer + 1]),
            }
            for layer in range(self.gap.shape[0])
            for head in range(self.gap.shape[1])
        ]


def changed_heads(a: SinkMap, b: SinkMap, most: int = 10) -> list[tuple[int, int, float, float]]:
    """(layer, head, mass in a, mass in b) of the heads whose sink mass differs most, largest difference first."""
    if a.sink_mass.shape != b.sink_mass.shape:
        raise ValueError("these two maps are of different models")
    order = (a.sink_mass - b.sink_mass).abs().flatten().argsort(descending=True, stable=True)[:most].tolist()
    heads = a.sink_mass.shape[1]
    return [(i // heads, i % heads, float(a.sink_mass.flatten()[i]), float(b.sink_mass.flatten()[i])) for i in order]


class SinkProbe:
    """Adds up a `SinkMap` over every forward pass inside its `with` block.

    Args:
        model: A causal language model of `FAMILIES`.
        domain: Name of the texts.
        first_query: n₀, the first query place that counts.
        places: P, how many places at the beginning get a mass of their own.

    Raises:
        PlanError: When the model is of another family.
        ValueError: n₀ lies before the last of the places, or there are none.
    """

    def __init__(self, model: Any, domain: str = "", *, first_query: int = 8, places: int = 4) -> None:
        if not 1 <= places <= first_query:
            raise ValueError(f"places must lie before the first query, 1 to {first_query}, got {places}")
        self.model, self.domain, self.first_query = model, domain, first_query
        self.layers = list(_supported(model))
        config = model.config.get_text_config()
        L, H = len(self.layers), config.num_attention_heads
        self._sums = {
            name: torch.zeros(shape, dtype=torch.float64)
            for name, shape in {
                "mass": (L, H, places),
                "gap": (L, H),
                "gaps": (L,),
                "value_first": (L, H),
                "value_others": (L, H),
                "residual_first": (L + 1,),
                "residual_others": (L + 1,),
            }.items()
        }
        self._rows = self._tokens = self._queries = 0
        self._seen: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        self._starts = self._hooks.enter_context(Starts(self.model))
        for i, layer in enumerate(self.layers):
            attention = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                self._hook(getattr(attention, name).register_forward_hook(partial(self._remember, name)))
            self._hook(attention.register_forward_hook(partial(self._attention, i), with_kwargs=True))
            if not i:
                self._hook(layer.register_forward_pre_hook(self._embedded, with_kwargs=True))
            self._hook(layer.register_forward_hook(partial(self._after, i + 1)))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._seen.clear()

    def _hook(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def result(self) -> SinkMap:
        """What was measured.

        Raises:
            DataError: When no text was longer than n₀ tokens.
        """
        if not self._queries:
            raise DataError(
                f"no text is longer than {self.first_query} tokens, so there is no query to measure",
                hint="give longer texts, or a smaller first_query",
            )
        s, others = self._sums, self._tokens - self._rows
        return SinkMap(
            mass=s["mass"] / self._queries,
            gap=s["gap"] / s["gaps"].clamp(min=1)[:, None],
            value_first=s["value_first"] / self._rows,
            value_others=s["value_others"] / others,
            residual_first=s["residual_first"] / self._rows,
            residual_others=s["residual_others"] / others,
            rows=self._rows,
            tokens=self._tokens,
            queries=self._queries,
            domain=self.domain,
        )

    # -------------------------------------------------------------- hooks

    def _remember(self, name: str, module: Any, args: Any, output: Tensor) -> None:
        self._seen[name] = output.detach()

    @torch.no_grad()
    def _embedded(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        starts = self._starts
        self._rows += int(starts.real.any(1).sum())
        self._tokens += int(starts.real.sum())
        self._queries += int((starts.real & (starts.places >= self.first_query)).sum())
        self._residual(0, args[0] if args else kwargs["hidden_states"])

    def _after(self, place: int, module: Any, args: Any, output: Any) -> None:
        self._residual(place, first_tensor(output))

    @torch.no_grad()
    def _residual(self, place: int, hidden: Tensor) -> None:
        norms = hidden.detach().double().norm(dim=-1) * self._starts.real
        first = (norms * (self._starts.places == 0)).sum()
        self._sums["residual_first"][place] += first.cpu()
        self._sums["residual_others"][place] += (norms.sum() - first).cpu()

    @torch.no_grad()
    def _attention(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
        B, T = self._starts.real.shape
        d = module.head_dim
        q, k, v = (self._seen.pop(name).view(B, T, -1, d) for name in ("q_proj", "k_proj", "v_proj"))
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        self._values(layer, module.o_proj.weight, v)
        window = getattr(module, "sliding_window", None)
        if not hasattr(module, "sliding_window"):
            window = getattr(module.config, "sliding_window", None)
        cap = getattr(module, "attn_logit_softcapping", None) if _caps(module) else None
        self._masses(layer, q, k, module.scaling, window, cap)

    def _values(self, layer: int, weight: Tensor, v: Tensor) -> None:
        """Norms of W_O^h V_j from the Gram matrix of each head's columns of W_O; v is [B, T, G, d]."""
        G, d = v.shape[2:]
        w = weight.detach().float().view(weight.shape[0], G, -1, d)  # [D, G, H / G, d]
        gram = torch.einsum("xgri,xgrj->grij", w, w)
        squares = torch.einsum("btgi,grij,btgj->btgr", v.float(), gram, v.float())
        norms = squares.clamp(min=0).sqrt().flatten(2) * self._starts.real[..., None]  # [B, T, H]
        first = (norms * (self._starts.places == 0)[..., None]).sum((0, 1)).double()
        self._sums["value_first"][layer] += first.cpu()
        self._sums["value_others"][layer] += (norms.sum((0, 1)).double() - first).cpu()

    def _masses(self, layer: int, q: Tensor, k: Tensor, scaling: float, window: int | None, cap: float | None) -> None:
        """Attention on the first places, and the logit gap; q is [B, H, T, d], k is [B, G, T, d]."""
        starts, sums = self._starts, self._sums
        B, H, T, d = q.shape
        G = k.shape[1]
        q, keys = q.reshape(B, G, H // G, T, d), k.float()[:, :, None].transpose(-1, -2)
        index = torch.arange(T, device=q.device)
        columns = (starts.first[:, None] + torch.arange(sums["mass"].shape[-1], device=q.device)).clamp(max=T - 1)
        chunk = max(1, BLOCK // max(1, B * H * T))
        for start in range(0, T, chunk):
            rows = index[start : start + chunk]
            counted = (starts.real & (starts.places >= self.first_query))[:, rows]  # [B, C]
            if not counted.any():
                continue
            logits = (q[:, :, :, rows].float() @ keys).flatten(1, 2) * scaling  # [B, H, C, T]
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            visible = (index <= rows[:, None]) & starts.real[:, None]  # [B, C, T]
            if window is not None:
                visible &= rows[:, None] - index < window
            visible |= (index == rows[:, None]) & ~counted[..., None]  # padding rows: any value, but a number
            attention = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
            on = attention.gather(-1, columns[:, None, None].expand(B, H, len(rows), -1))  # [B, H, C, P]
            sums["mass"][layer] += (on * counted[:, None, :, None]).sum((0, 2)).double().cpu()
            at = starts.first[:, None, None].expand(B, len(rows), 1)
            others = visible & (index != at)
            both = counted & visible.gather(-1, at)[..., 0] & others.any(-1)
            mean = (logits * others[:, None]).sum(-1) / others.sum(-1).clamp(min=1)[:, None]
            gap = logits.gather(-1, at[:, None].expand(B, H, -1, 1))[..., 0] - mean
            sums["gap"][layer] += (gap * both[:, None]).sum((0, 2)).double().cpu()
            sums["gaps"][layer] += both.sum().double().cpu()


def _caps(module: Any) -> bool:
    """Whether the attention applies the cap it has: Gemma 3 keeps the attribute and does not use it."""
    return module.config.model_type == "gemma2"


def _supported(model: Any) -> Any:
    """The decoder layers of a model whose attention is known here."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES or getattr(model.config, "use_bidirectional_attention", False):
        raise PlanError(
            f"the attention of `{kind}` is not known to the sink probe",
            hint=f"it reads causal decoders with q_proj, k_proj, v_proj and RoPE: {', '.join(FAMILIES)}",
        )
    return decoder_layers(model)


def diagnose(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    domain: str = "",
    *,
    first_query: int = 8,
    places: int = 4,
) -> SinkMap:
    """Measure sinks, drain and peaks on some texts.

    Args:
        model: A causal language model of `FAMILIES`; its mode is restored.
        batches: `input_ids` and, where rows are padded, `attention_mask` [B, T].
        domain: Name of the texts.
        first_query: See `SinkProbe`.
        places: See `SinkProbe`.

    Raises:
        PlanError: When the model is of another family.
        DataError: When no text is longer than `first_query` tokens.
    """
    with torch.no_grad(), evaluating(model), SinkProbe(model, domain, first_query=first_query, places=places) as probe:
        for batch in batches:
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask") if name in batch}
            if inputs["input_ids"].numel():
                model.base_model(**inputs, use_cache=False)
    return probe.result()
