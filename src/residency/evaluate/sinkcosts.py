"""What a model's first token is worth to those who want to drop it or to quantise around it: measured, not inferred.

*Eviction.* A text's first half goes into the cache, then entries are dropped, and the second half is predicted. Nats
per token with the whole cache; without the first token; without one other token drawn at random (mean over some draws);
with only the newest half of the entries; and with the first token and the newest, as many entries. If the second costs
much and the third nothing, an eviction policy has to keep the first token, whatever its scores say.

*Quantisation.* The inputs of all linear maps in the layers as int8 with one scale per tensor and text,
s = max |x| / 127, once with the first token among those that set the scale, once with the first token left in full
precision. Error of the other tokens on clean inputs, ‖x − s·round(x / s)‖² / ‖x‖², mean over a layer's linear maps; and
nats per token when all layers compute that way. Weights stay as they are. The arithmetic is simulated (rounded, then
computed in the model's precision), the errors are measured.

Dropping an entry is done by the attention mask of the queries that come later, which is the same as taking it out of
the cache and leaving the positions (tested).

The paper's: neither; they say what the phenomena mean for a model that will be compressed. Cache eviction with sinks is
StreamingLLM's (Xiao et al., ICLR 2024, arXiv 2309.17453), massive activations against quantisation are discussed by Sun
et al., "Massive Activations in Large Language Models", 2024, arXiv 2402.17762.

Cost: eviction two and a half forward passes over the texts plus half of one per draw; quantisation three passes.
Memory: logits of `BATCH_TOKENS` tokens.

Inputs: texts as token ids. Relations: `sinks` says where the sinks are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residency.errors import DataError
from residency.evaluate.textstarts import Starts, decoder_layers
from residency.modes import evaluating

BATCH_TOKENS = 512
"""Tokens of one forward pass, padding included."""
LEVELS = 127


@dataclass(frozen=True)
class EvictionCost:
    """Nats per token of the second halves, by what was dropped from the cache of the first halves.

    Args:
        whole: Nothing.
        without_first: The first token.
        without_another: One other token; mean over the draws.
        newest: All but the newest half of the entries.
        first_and_newest: The same number of entries, one of them the first token.
        texts, tokens: What the means run over.
    """

    whole: float
    without_first: float
    without_another: float
    newest: float
    first_and_newest: float
    texts: int
    tokens: int


@torch.no_grad()
def eviction_cost(model: Any, texts: Sequence[Sequence[int]], *, draws: int = 3, seed: int = 0) -> EvictionCost:
    """Measure what dropping cache entries costs.

    Args:
        model: A causal language model.
        texts: Token ids; those of fewer than 8 tokens are left out.
        draws: How many other tokens are dropped in turn, per text.
        seed: Which.

    Raises:
        DataError: When every text is too short.
    """
    texts = [list(text) for text in texts if len(text) >= 8]
    if not texts:
        raise DataError("every text is shorter than 8 tokens", hint="give longer texts to measure eviction on")
    totals, count, generator = torch.zeros(4 + draws, dtype=torch.float64), 0, random.Random(seed)
    with evaluating(model):
        for text in texts:
            ids = torch.tensor([text], device=model.device)
            total, half = len(text), len(text) // 2
            newest = half - half // 2  # first entry that stays
            kept = torch.ones(4 + draws, total, dtype=torch.long, device=ids.device)
            kept[1, 0] = 0
            kept[2, :newest] = 0
            kept[3, 1 : newest + 1] = 0
            for i in range(draws):
                kept[4 + i, generator.randrange(1, half)] = 0
            cache = model(ids[:, :half], use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(kept))
            logits = model(
                ids[:, half:].expand(len(kept), -1),
                attention_mask=kept,
                position_ids=torch.arange(half, total, device=ids.device)[None].expand(len(kept), -1),
                past_key_values=cache,
                use_cache=True,
            ).logits
            for i, row in enumerate(logits):
                totals[i] += _nats(row[None, :-1], ids[:, half + 1 :]).sum().cpu()
            count += total - half - 1
    whole, first, newest_only, sink_kept = (totals[:4] / count).tolist()
    another = float(totals[4:].mean() / count) if draws else whole
    return EvictionCost(whole, first, another, newest_only, sink_kept, len(texts), count)


@dataclass(frozen=True)
class QuantisationCost:
    """What int8 activations cost with the first token in the scale, and with it left in full precision.

    Args:
        nats: Nats per token of the model as it is.
        nats_shared, nats_apart: The same with all linear inputs as int8, the first token among the others, and apart.
        error_shared, error_apart: [L] relative squared error of the other tokens, mean over the layer's linear maps.
        tokens: What the means run over.
    """

    nats: float
    nats_shared: float
    nats_apart: float
    error_shared: Tensor
    error_apart: Tensor
    tokens: int


@torch.no_grad()
def quantisation_cost(model: Any, texts: Sequence[Sequence[int]]) -> QuantisationCost:
    """Measure what per-tensor int8 activations cost.

    Args:
        model: A causal language model in the llama layout.
        texts: Token ids, at least two of each.

    Raises:
        DataError: When no text has two tokens.
    """
    texts = [list(text) for text in texts if len(text) >= 2]
    if not texts:
        raise DataError("no text has two tokens", hint="give longer texts to measure quantisation on")
    sums: dict[tuple[int, Any], Tensor] = {}  # of each linear map: squared errors shared and apart, squares

    def look(layer: int, module: Any, x: Tensor, starts: Starts) -> None:
        others = (starts.real & (starts.places > 0))[..., None]
        errors = [(as_int8(x, starts, apart=apart).double() - x) * others for apart in (False, True)]
        found = torch.stack([value.square().sum() for value in (*errors, x.double() * others)]).cpu()
        sums[layer, module] = sums.get((layer, module), torch.zeros(3, dtype=torch.float64)) + found

    nats = []
    with evaluating(model):
        with _linear_inputs(model, look):
            nats.append(mean_nats(model, texts))
        for apart in (False, True):

            def rounded(layer: int, module: Any, x: Tensor, starts: Starts, apart: bool = apart) -> Tensor:
                return as_int8(x, starts, apart=apart)

            with _linear_inputs(model, rounded):
                nats.append(mean_nats(model, texts))
    errors = torch.zeros(len(decoder_layers(model)), 2, dtype=torch.float64)
    for layer in range(len(errors)):
        ratios = [found[:2] / found[2].clamp(min=1e-300) for (place, _), found in sums.items() if place == layer]
        errors[layer] = torch.stack(ratios).mean(0)
    tokens = sum(len(text) - 1 for text in texts)
    return QuantisationCost(nats[0], nats[1], nats[2], errors[:, 0], errors[:, 1], tokens)


def as_int8(x: Tensor, starts: Starts, *, apart: bool) -> Tensor:
    """Round x [B, T, ·] to int8 with one scale per text; with `apart`, the first token stays and sets no scale."""
    inside = starts.real & (starts.places > 0) if apart else starts.real
    values = x.float()
    scale = (values.abs() * inside[..., None]).amax((1, 2), keepdim=True).clamp(min=1e-30) / LEVELS
    rounded = (values / scale).round().clamp(-LEVELS, LEVELS) * scale
    return torch.where(inside[..., None], rounded, values).to(x.dtype)


@contextmanager
def _linear_inputs(model: Any, change: Any) -> Iterator[None]:
    """Hand the input of every linear map to `change(layer, map, x, starts)`, and use what it returns, if anything."""
    with ExitStack() as hooks:
        starts = hooks.enter_context(Starts(model))
        for place, layer in enumerate(decoder_layers(model)):

            def before(module: Any, args: tuple[Tensor, ...], place: int = place) -> Any:
                changed = change(place, module, args[0], starts)
                return None if changed is None else (changed, *args[1:])

            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    hooks.callback(module.register_forward_pre_hook(before).remove)
        yield


@torch.no_grad()
def mean_nats(model: Any, texts: Sequence[Sequence[int]]) -> float:
    """Nats per token of every token but the first."""
    total, count = 0.0, 0
    for group in groups(texts, BATCH_TOKENS):
        batch = padded(group, model.device)
        logits = model(**batch, use_cache=False).logits
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        for row, tokens, length in zip(logits, ids, real.sum(1).tolist(), strict=True):
            total += float(_nats(row[None, : length - 1], tokens[None, 1:length]).sum())
            count += length - 1
    return total / count


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target [B, T] under logits [B, T, V], float64."""
    return nn.functional.cross_entropy(logits[0].float(), targets[0], reduction="none").double()


def groups(texts: Sequence[Sequence[int]], tokens: int) -> Iterator[list[Sequence[int]]]:
    """The texts, longest first, in batches of at most `tokens` with padding, or of one text."""
    group: list[Sequence[int]] = []
    for text in sorted(texts, key=len, reverse=True):
        if group and (len(group) + 1) * len(group[0]) > tokens:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def padded(texts: Sequence[Sequence[int]], device: Any = "cpu") -> dict[str, Tensor]:
    """input_ids and attention_mask [B, T], padded on the right with token 0."""
    width = max(len(text) for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
