"""Fewer key/value heads: turn heads until they agree, then let each group share one (MHA → GQA, GQA → MQA).

The idea. The KV cache grows with the number of key/value heads, and generating reads it for every token. Averaging the
heads of a group, as GQA's authors do, destroys the model, because heads compute similar things in different
coordinates. Attention leaves the choice of coordinates free, so choose them such that the heads of a group agree; only
then average. With column vectors, R_j planar for keys, Q_j orthogonal for values (see `headalign`):

    W_K^j ← R_jᵀ W_K^j,  W_Q^h ← R_jᵀ W_Q^h          for every query head h that reads key/value head j
    W_V^j ← Q_jᵀ W_V^j,  W_O^h ← W_O^h Q_j           biases of q, k and v alike
    W̃_K = mean_j W_K^j,  W̃_V = mean_j W_V^j          over the group; optionally × mean_j ‖W^j‖ / ‖W̃‖

Up to the last line nothing is lost: logits change by rounding. R_j commutes with RoPE, so (RoPE_t R_jᵀ q)·(RoPE_s
R_jᵀ k) = (RoPE_t q)·(RoPE_s k), and Q_j cancels between values and output. Heads of a group are moved next to each
other together with the query heads that read them. The result is an ordinary checkpoint whose config says
`num_key_value_heads`.

The paper's: alignment, grouping, the mean. Our choice: query heads follow their key/value head, so that GQA models
can be merged further; biases are turned too; the norms of the mean may be restored for keys, for values or both, and
the loss on held-out calibration text decides (`restore`: it saved 3 nats on one published model and cost 1 on
SmolLM2). Much better than the mean, before any training, is least squares: see `headfit`.

Cost: one forward pass of the calibration text for all statistics; the surgery itself takes seconds.

Paper: Jin et al., "Align Attention Heads Before Merging Them", Findings of EMNLP 2025, arXiv 2412.20677. Official code:
github.com/fpcsong/mha2gqa, commit c0706da (no licence; nothing of it is used). GQA and mean-pooling: Ainslie et al.,
EMNLP 2023, arXiv 2305.13245.

Inputs: a model of `headsupport.ARCHITECTURES` and batches of text. Relations: `headfit` merges by least squares and
should be preferred where no training follows; `headmasks` merges gradually while training.

Example:
    >>> plan = plan_merge(model, batches, kv_heads=1)
    >>> small = merge_heads(model, plan)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residency.compress import headalign, headgroups
from residency.compress.headgrams import (
    Attention,
    Batch,
    LayerGrams,
    attentions,
    collect,
    layer_bytes,
    model_inputs,
    needs_float64,
)
from residency.errors import DataError, PlanError
from residency.modes import evaluating
from residency.objective import next_token_positions
from residency.progress import Progress

GroupBy = Literal["value", "key", "both", "none"]
Restore = Literal["none", "keys", "values", "both"]

GRAM_BYTES = 2 << 30
"""Statistics of so many layers at a time; every further round is one more pass over the calibration text."""


@dataclass(frozen=True)
class LayerPlan:
    """How one layer's heads are to be merged.

    Args:
        groups: Members (original indices of key/value heads) of every new head, in the order of the new heads.
        keys: [G, d, d] planar rotations of keys, by original head; x ↦ xR.
        values: [G, d, d] orthogonal maps of values.
        before, after: [2, G, G] mean cosine per token of every pair of heads (keys, values), as they are and after the
            best alignment of the two.
    """

    groups: headgroups.Groups
    keys: Tensor
    values: Tensor
    before: Tensor
    after: Tensor


def plan_merge(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    kv_heads: int,
    group_by: GroupBy = "value",
    criterion: headalign.Criterion = "cos",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LayerPlan]:
    """Choose groups and rotations for every layer from a pass over the calibration text.

    Args:
        model: A supported causal language model; unchanged.
        batches: `input_ids` [B, T] and, unless nothing is padded, `attention_mask`.
        kv_heads: Key/value heads afterwards, a divisor of the present number.
        group_by: Which vectors must agree inside a group; "none" keeps neighbours together.
        criterion: Agreement by cosine of every token, or by squared distance.
        seed: Of the search for groups, where it is random (more than 16 heads).
        progress: Where to report.

    Raises:
        PlanError: When the model cannot be merged so.
        DataError: When there is no text, or the model is not finite on it.
    """
    attention, batches = attentions(model), list(batches)
    check_heads(attention[0], kv_heads)
    at_once = max(1, GRAM_BYTES // layer_bytes(attention[0]))
    plans: list[LayerPlan] = []
    for start in range(0, len(attention), at_once):
        some = range(start, min(start + at_once, len(attention)))
        for grams in collect(model, batches, some, progress):
            plans.append(plan_layer(grams, kv_heads, group_by, criterion, seed))  # noqa: PERF401
    return plans


def plan_layer(
    grams: LayerGrams,
    kv_heads: int,
    group_by: GroupBy = "value",
    criterion: headalign.Criterion = "cos",
    seed: int = 0,
    groups: headgroups.Groups | None = None,
) -> LayerPlan:
    """Groups and rotations of one layer from its Gram blocks; with `groups`, only rotations."""
    G = len(grams.keys.raw)
    if groups is None:
        if group_by == "none":
            groups = headgroups.adjacent(G, kv_heads)
        else:
            groups = headgroups.partition(_agreement(grams, group_by, criterion).numpy(), kv_heads, seed=seed)
    maps = []
    for kind, some in _kinds(grams):
        R = torch.zeros_like(some.raw[0])
        C = headalign.blocks(some, criterion)
        for group in groups:
            members = list(group)
            R[members] = headalign.align_group(C[members][:, members], kind).rotations
        maps.append(R)
    before = torch.stack([headalign.scores(some, None, "cos") for _, some in _kinds(grams)])
    after = torch.stack([headalign.scores(some, kind, "cos") for kind, some in _kinds(grams)])
    return LayerPlan(groups, maps[0], maps[1], before, after)


def neighbours(model: PreTrainedModel, kv_heads: int) -> list[LayerPlan]:
    """The plan that looks at nothing: neighbours together, no rotation (GQA's own conversion by the mean)."""
    plans = []
    for a in attentions(model):
        check_heads(a, kv_heads)
        eye = torch.eye(a.head_dim, dtype=torch.float64).repeat(a.kv_heads, 1, 1)
        unknown = torch.full((2, a.kv_heads, a.kv_heads), torch.nan, dtype=torch.float64)
        plans.append(LayerPlan(headgroups.adjacent(a.kv_heads, kv_heads), eye, eye, unknown, unknown))
    return plans


@torch.no_grad()
def apply_alignment(model: PreTrainedModel, plan: Sequence[LayerPlan]) -> None:
    """Turn and reorder the heads as planned, in place. Logits change by rounding only.

    Afterwards the members of new head n are the key/value heads n·g … n·g + g − 1. Computed in float64, stored in the
    weights' own dtype.
    """
    needs_float64(model)
    for a, layer in zip(attentions(model), checked(model, plan), strict=True):
        order = torch.tensor([j for group in layer.groups for j in group])
        readers = (order[:, None] * a.share + torch.arange(a.share)).flatten()  # query heads follow
        key_maps, value_maps = layer.keys.mT, layer.values.mT
        rows = {"k_proj": (key_maps, order), "v_proj": (value_maps, order)}
        rows["q_proj"] = (key_maps.repeat_interleave(a.share, 0), readers)
        for name, (maps, permutation) in rows.items():
            turn_rows(getattr(a.module, name), maps, permutation)
        W = a.module.o_proj.weight
        heads = W.double().reshape(len(W), a.heads, a.head_dim)
        turned = torch.einsum("ohd,hde->ohe", heads, layer.values.repeat_interleave(a.share, 0).to(W.device))
        W.copy_(turned[:, readers.to(W.device)].flatten(1))


@torch.no_grad()
def merge(model: PreTrainedModel, kv_heads: int, restore: Restore = "none") -> PreTrainedModel:
    """Replace each run of neighbouring key/value heads by their mean, in place.

    Args:
        model: A supported model, usually after `apply_alignment`.
        kv_heads: Key/value heads afterwards.
        restore: Which projections' means are scaled back to their members' mean Frobenius norm.

    Returns:
        The same model, an ordinary one with `config.num_key_value_heads` heads.
    """
    found = attentions(model)
    needs_float64(model)
    for a in found:
        check_heads(a, kv_heads)
    for a in found:
        for name, kind in (("k_proj", "keys"), ("v_proj", "values")):
            setattr(a.module, name, mean_projection(getattr(a.module, name), a, kv_heads, restore in (kind, "both")))
    return declare(model, kv_heads)


@torch.no_grad()
def mean_projection(projection: nn.Linear, a: Attention, kv_heads: int, restore: bool = False) -> nn.Linear:
    """The projection [kv_heads·d, D] whose heads are the means of neighbouring heads."""
    W, b = projection.weight.double(), projection.bias
    members = W.reshape(kv_heads, a.kv_heads // kv_heads, -1)
    mean = members.mean(1)
    scale = torch.ones(kv_heads, 1, dtype=W.dtype, device=W.device)
    if restore:
        scale = members.norm(dim=-1).mean(1, keepdim=True) / mean.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    bias = None if b is None else (b.double().reshape(kv_heads, -1, a.head_dim).mean(1) * scale).flatten()
    return linear(projection, (mean * scale).reshape(-1, W.shape[1]), bias)


def linear(like: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with these weights, in dtype, device, mode and trainability like another."""
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    made.weight = nn.Parameter(weight.to(like.weight), like.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(like.weight), like.weight.requires_grad)
    return made.train(like.training)


def turn_rows(projection: nn.Linear, maps: Tensor, order: Tensor) -> None:
    """In place: the rows of head j become maps[j] @ rows, then heads are reordered; biases alike."""
    d = maps.shape[-1]
    for parameter in (projection.weight, projection.bias):
        if parameter is not None:
            heads = parameter.double().reshape(-1, d, *parameter.shape[1:])
            turned = torch.einsum("hde,he...->hd...", maps.to(heads.device), heads)
            parameter.copy_(turned[order.to(heads.device)].reshape(parameter.shape))


def declare(model: PreTrainedModel, kv_heads: int) -> PreTrainedModel:
    """Tell config and modules how many key/value heads there are now."""
    config: Any = model.base_model.config
    config.num_key_value_heads = kv_heads
    for a in attentions(model):
        a.module.num_key_value_groups = a.heads // kv_heads
        if hasattr(a.module, "num_key_value_heads"):
            a.module.num_key_value_heads = kv_heads
    return model


def merge_heads(model: PreTrainedModel, plan: Sequence[LayerPlan], restore: Restore = "none") -> PreTrainedModel:
    """A new model with its heads aligned as planned and merged; the model given stays as it is."""
    small = copy.deepcopy(model)
    apply_alignment(small, plan)
    return merge(small, len(plan[0].groups), restore)


@torch.no_grad()
def text_loss(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """Mean loss of the next token in nats: of the trained tokens where batches have `labels`, else of all."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            inputs = model_inputs(batch, model)
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            labels = ids if mask is None else torch.where(mask.bool(), ids, -100)
            if "labels" in batch:
                labels = batch["labels"].to(ids.device)
            predicts, targets = next_token_positions(labels)
            for row in range(len(ids)):  # logits of one row at a time
                one = {name: value[row : row + 1] for name, value in inputs.items()}
                logits = model(**one, use_cache=False).logits[0][predicts[row]]
                wanted = labels[row, 1:][predicts[row, :-1]]
                total += float(nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"))
            count += len(targets)
    if not count:
        raise DataError("no token to predict in the batches", hint="rows need at least two tokens")
    return total / count


def _kinds(grams: LayerGrams) -> tuple[tuple[headalign.Kind, Any], tuple[headalign.Kind, Any]]:
    return ("key", grams.keys), ("value", grams.values)


def _agreement(grams: LayerGrams, group_by: GroupBy, criterion: headalign.Criterion) -> Tensor:
    """[G, G] by which heads are grouped. Of both: distances as shares of each kind's own energy, so that they add."""
    total = torch.zeros(grams.keys.raw.shape[:2], dtype=torch.float64)
    for kind, some in _kinds(grams):
        if group_by in (kind, "both"):
            S = headalign.scores(some, kind, criterion)
            if criterion == "dist":
                energy = some.raw.diagonal(dim1=-2, dim2=-1).sum(-1).diagonal().mean() / some.tokens
                S = S / energy.clamp_min(torch.finfo(torch.float64).tiny)
            total += S
    return total


def check_heads(a: Attention, kv_heads: int) -> None:
    """Raise PlanError unless the layer's heads can form so many equal groups."""
    if not 1 <= kv_heads <= a.kv_heads or a.kv_heads % kv_heads:
        raise PlanError(
            f"{a.kv_heads} key/value heads cannot become {kv_heads}: groups must be equal",
            hint=f"choose one of {', '.join(str(n) for n in range(1, a.kv_heads + 1) if a.kv_heads % n == 0)}",
        )


def checked(model: PreTrainedModel, plan: Sequence[LayerPlan]) -> Sequence[LayerPlan]:
    """The plan; ValueError when it is not one of this model."""
    found = attentions(model)
    shapes = [(a.kv_heads, a.head_dim, a.head_dim) for a in found]
    if [tuple(layer.keys.shape) for layer in plan] != shapes or [tuple(p.values.shape) for p in plan] != shapes:
        raise ValueError(
            f"the plan is of {len(plan)} layers and another shape than this model of {len(found)} layers with "
            f"{found[0].kv_heads} key/value heads of width {found[0].head_dim}: plan and model must belong together"
        )
    if any(sorted(j for group in p.groups for j in group) != list(range(len(p.keys))) for p in plan):
        raise ValueError("every head must be in exactly one group of its layer")
    return plan
