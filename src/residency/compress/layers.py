"""Depth pruning: which decoder layers a model can do without, and the model without them.

The idea. A decoder layer adds a small correction to a residual stream, and in many models some corrections hardly
matter for the task at hand. Measure how much each layer matters on real rows, keep the most important, and copy them
into a shallower model of the same architecture: a student that starts close to its teacher, saves as an ordinary
checkpoint, and is faster in proportion. Distillation then repairs what was lost.

Two measures of importance, and a search:

    block_influence   BI_l = 1 − mean over tokens of cos(h_l, h_l+1)        h_l, h_l+1 [D]: input, output of layer l
    loss_increase     Δ_l  = loss(without layer l) − loss(with all), nats per answer token
    prune_greedily    remove the layer with the least Δ, measure again in what is left, repeat

Which to use. Influence needs one forward pass and no labels, but asks how much a layer *moves* the stream, not whether
the move helps. Loss increase asks the question itself, one layer at a time. Layers stand in for each other, though:
two may each be dispensable while their pair is not. Only the greedy search sees that.

The papers'. Block influence and one-shot removal by it: ShortGPT. Greedy removal by the loss with the first and last
layer barred: SLEB. Our choice: the loss is that of the answers, not of all text; real tokens only, sums in float64;
the last layer's output is taken before the final norm; the barred ends also apply to influence; the inputs of all
layers are cached once per batch, so trying layer l runs only the layers behind it, half the work.

Cost, in forward passes of the calibration batches. Influence: 1. Loss increase: 1 + L/2. Greedy, to remove R of L
layers: R + Σ_r (L − r)²/2L, about 120 for 30 → 20 layers. Memory: L × [B, T, D] of one batch beside the model, and the
logits of the answer positions. `keep_layers`: the new model.

Papers: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, arXiv
2403.03853; official code: none known to us. Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and
Elimination of Transformer Blocks", ICML 2024, arXiv 2402.09025; official code: github.com/jiwonsong-dev/SLEB, commit
d07129a.

Inputs: a decoder-only causal language model whose backbone has `.layers` or `.h`, and batches of `input_ids`,
`attention_mask` [B, T] (and `labels`, for a loss); or a BERT-like classifier (`.encoder.layer`) and `labels` [B]: class
indices (cross-entropy per row) or numbers (squared error per row). Relations: `bild.py` and `kl.py` train what
`keep_layers` returns.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residency.compress.decoder import (
    decoder,
    hidden_input,
    hidden_output,
    passing,
    recording,
    replaced,
    uncached,
)
from residency.compress.relufy import install_thresholds
from residency.errors import DataError, PlanError
from residency.modes import evaluating
from residency.objective import next_token_positions
from residency.progress import Progress

Batch = Mapping[str, Tensor]
Ends = tuple[int, int]

ENDS: Ends = (1, 1)
"""Layers at the two ends that are never removed (SLEB's barriers): the first turns embeddings into features, the last
features into predictions, and influence, which only sees motion, cannot tell how much hangs on them."""

_INPUTS = ("input_ids", "attention_mask", "position_ids")
_NOT_PER_LAYER = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id")
_NOT_BEHAVIOUR = ("training", "gradient_checkpointing")


class Pruning(NamedTuple):
    """What `prune_greedily` found.

    Args:
        kept: Indices of the layers that stay, ascending.
        increase: [R, L] nats per answer token over the complete model if, in round r, layer l went in addition to those
            already gone; NaN where it was not tried. Row 0 is `loss_increase`.
    """

    kept: list[int]
    increase: Tensor


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Iterable[Batch], progress: Progress | None = None) -> Tensor:
    """How far each layer turns the residual stream, over the real tokens of all batches.

    Args:
        model: A supported causal language model (see the module); its mode is restored.
        batches: `input_ids` [B, T] and, unless nothing is padded, `attention_mask` [B, T].
        progress: Where to report; None is silent.

    Returns:
        [L] float64 on the CPU, from 0 (the layer does nothing) to 2 (it reverses its input).
    """
    backbone, layers = decoder(model)
    turned, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    real: Tensor

    def watch(index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            before, after = hidden_input(args, kwargs)[real].double(), hidden_output(output)[real].double()
            turned[index] += (1 - nn.functional.cosine_similarity(before, after, dim=-1)).sum().cpu()

        return hook

    batches = list(batches)
    with evaluating(model), contextlib.ExitStack() as hooks:
        for index, layer in enumerate(layers):
            handle = layer.register_forward_hook(watch(index), with_kwargs=True)
            hooks.callback(handle.remove)
        with (progress or Progress()).task("block influence", len(batches)) as advance:
            for batch in batches:
                inputs = model_inputs(batch, model)
                real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
                backbone(**inputs, **uncached(model))
                tokens += int(real.sum())
                advance(1)
    if not tokens:
        raise DataError("no real token in the batches", hint="importance of layers needs at least one row")
    return turned / tokens


def choose_layers(influence: Tensor, keep: int, ends: Ends = ENDS) -> list[int]:
    """The `keep` most important layers, the ends always among them.

    Args:
        influence: [L] importance, of either measure.
        keep: Layers that stay, sum(ends) ≤ keep ≤ L.
        ends: Layers at the start and at the end that stay whatever their importance.

    Returns:
        Indices, ascending. Of equally important layers, the earlier one stays.
    """
    barred = _barred(len(influence), keep, ends)
    if influence.isnan().any():
        raise ValueError("influence has NaN entries: the model's hidden states are not finite on these batches")
    ranked = sorted(range(len(influence)), key=lambda layer: (layer not in barred, -float(influence[layer]), layer))
    return sorted(ranked[:keep])


def loss_increase(model: PreTrainedModel, batches: Iterable[Batch], progress: Progress | None = None) -> Tensor:
    """What leaving out each layer alone costs, in nats per answer token.

    Args:
        model: A supported causal language model; its mode is restored.
        batches: `input_ids`, `labels` [B, T] (`IGNORE` outside the answers) and `attention_mask` [B, T] if padded.
        progress: Where to report; None is silent.

    Returns:
        [L] float64 on the CPU; negative where the model is better without the layer.
    """
    layers, batches = decoder(model)[1], list(batches)
    with (progress or Progress()).task("importance of layers", len(batches)) as advance:
        base, without = _losses(model, batches, list(range(len(layers))), range(len(layers)), advance)
    return without - base


def prune_greedily(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    keep: int,
    progress: Progress | None = None,
    ends: Ends = ENDS,
) -> Pruning:
    """Remove one layer at a time, each time the one whose absence costs the least now.

    Args:
        model: A supported causal language model; unchanged. Build the smaller one with `keep_layers(model, kept)`.
        batches: As for `loss_increase`. All rounds use the same ones.
        keep: Layers that stay, sum(ends) ≤ keep ≤ L.
        progress: Where to report; None is silent.
        ends: Layers at the start and at the end that stay.

    Returns:
        See `Pruning`; `kept, increase = prune_greedily(...)`. Of equal costs, the later layer goes.
    """
    L, batches = len(decoder(model)[1]), list(batches)
    barred = _barred(L, keep, ends)
    kept, rounds, base = list(range(L)), [], 0.0
    with (progress or Progress()).task("removing layers", (L - keep) * len(batches)) as advance:
        for round_ in range(L - keep):
            # the barred are measured once, for the report
            tried = kept if round_ == 0 else [layer for layer in kept if layer not in barred]
            loss, without = _losses(model, batches, kept, tried, advance)
            base = loss if round_ == 0 else base
            rounds.append(without - base)
            kept.remove(min(set(kept) - barred, key=lambda layer: (float(without[layer]), -layer)))
    return Pruning(kept, torch.stack(rounds) if rounds else torch.empty(0, L, dtype=torch.float64))


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new model with these decoder layers only; embeddings, final norm and head are copied.

    Args:
        model: A supported causal language model; unchanged, and nothing is shared with the result.
        layers: Indices to keep, strictly ascending, at least one.

    Returns:
        A model of the same class, device, dtype and mode, whose config describes it: `save_pretrained` and
        `from_pretrained` give the same logits. Layers are renumbered, so the KV cache has no gaps.

    Raises:
        PlanError: When a layer behaves differently at its new place (a pattern the config derives from the position),
            so that the saved checkpoint would be a different model.
    """
    _, old = decoder(model)
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < len(old):
        raise ValueError(f"layers must be distinct, ascending and within 0..{len(old) - 1}, got {kept}")
    # One memo for all copies keeps shared things shared (tied weights, the config); putting the short list
    # there beforehand means that the dropped layers are never copied.
    memo: dict[int, Any] = {}
    memo[id(old)] = nn.ModuleList(copy.deepcopy(old[layer], memo) for layer in kept)
    small = copy.deepcopy(model, memo)
    config: Any = small.base_model.config
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == len(old) and name not in _NOT_PER_LAYER:
            setattr(config, name, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)
    for place, layer in enumerate(decoder(small)[1]):
        for module in layer.modules():
            vars(module).update(dict.fromkeys(vars(module).keys() & {"layer_idx", "layer_id"}, place))
    _check_places(small, kept)
    return small


def _losses(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    active: list[int],
    tried: Iterable[int],
    advance: Callable[..., None],
) -> tuple[float, Tensor]:
    """Loss per answer token of the model reduced to `active`, and [L] of it without each of `tried` (else NaN)."""
    layers, tried = decoder(model)[1], list(tried)
    base, count = 0.0, 0
    without = torch.full((len(layers),), torch.nan, dtype=torch.float64)
    without[tried] = 0
    with torch.no_grad(), evaluating(model):
        idle = passing(model)
        gone = {i: idle for i in range(len(layers)) if i not in active}
        for batch in batches:
            answers = _Answers(model, batch)
            count += answers.count
            if answers.count:
                entering: dict[int, Tensor] = {}
                watched = {i: recording(layers[i], functools.partial(entering.__setitem__, i)) for i in active}
                with replaced(layers, gone | watched):
                    base += answers.loss()
                for layer in tried:
                    # nothing in front of it needs to run: what enters it is known, and is now what leaves it
                    skipped = dict.fromkeys(range(layer), idle)
                    skipped[layer] = functools.partial(idle, instead=entering[layer])
                    with replaced(layers, gone | skipped):
                        without[layer] += answers.loss()
            advance(1)
    if not count:
        raise DataError("no trained token in the batches", hint="labels must hold the answers' token ids")
    return base / count, without / count


class _Answers:
    """The loss of one batch on its answer tokens, with logits only where an answer is predicted; or on its classes."""

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        self.model, self.inputs = model, model_inputs(batch, model) | uncached(model)
        labels = batch["labels"].to(model.device)
        self.mask: Any = slice(None)
        if labels.ndim == 1:
            self.targets, self.count = labels, len(labels)
            return
        mask, self.targets = next_token_positions(labels)
        self.count = len(self.targets)
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            positions = mask.any(0).nonzero().squeeze(1)
            self.inputs["logits_to_keep"], mask = positions, mask[:, positions]
        self.mask = mask

    def loss(self) -> float:
        # the model's own forward, not hidden states and head: some models scale or cap their logits
        logits = self.model(**self.inputs).logits[self.mask].float()
        if self.targets.is_floating_point():
            return float((logits.squeeze(-1) - self.targets).square().sum())
        return float(nn.functional.cross_entropy(logits, self.targets, reduction="sum"))


def model_inputs(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """What of a batch is the model's, on its device."""
    return {name: batch[name].to(model.device) for name in _INPUTS if name in batch}


def _barred(L: int, keep: int, ends: Ends) -> set[int]:
    """The layers that may not go; raises if more would stay than `keep`."""
    barred = {*range(min(ends[0], L)), *range(max(0, L - ends[1]), L)}
    if min(ends) < 0 or not max(1, len(barred)) <= keep <= L:
        raise ValueError(
            f"keep must lie between {max(1, len(barred))} (the {ends[0]} first and {ends[1]} last layers stay) "
            f"and {L}, got {keep}"
        )
    return barred


def _check_places(small: PreTrainedModel, kept: list[int]) -> None:
    """Raise PlanError unless a model rebuilt from the saved config would treat every layer as its copy is treated."""
    config = type(small.config).from_dict(small.config.to_dict())
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        rebuilt = type(small)(config)
    install_thresholds(rebuilt)
    pairs = zip(decoder(small)[1], decoder(rebuilt)[1], strict=True)
    for place, (copied, fresh) in enumerate(pairs):
        for difference in _differences(copied, fresh):
            raise PlanError(
                f"layer {kept[place]} cannot become layer {place}: its {difference} depends on the position, so the "
                "saved model would be another one",
                where=f"layers {kept} of a {type(small).__name__}",
                hint="keep layers that repeat the model's pattern, or choose another base model",
            )


def _differences(copied: nn.Module, fresh: nn.Module) -> list[str]:
    """Names of submodules and plain settings in which two layers differ."""
    ours, theirs = dict(copied.named_modules()), dict(fresh.named_modules())
    names = [name for name in ours.keys() | theirs.keys() if type(ours.get(name)) is not type(theirs.get(name))]
    for name in ours.keys() & theirs.keys():
        mine, other = vars(ours[name]), vars(theirs[name])
        names += [
            f"{name}.{key}".lstrip(".")
            for key in mine.keys() & other.keys()
            if not key.startswith("_") and key not in _NOT_BEHAVIOUR
            if isinstance(mine[key], bool | int | float | str | None) and mine[key] != other[key]
        ]
    return sorted(names)
