"""Width pruning: a narrower student of the same depth, by what its channels and heads carry on real rows.

The idea. A transformer is wide in three places, and each can be cut without changing its architecture: the channels of
its residual stream (D), the inner channels of every feed-forward layer (F), and its attention heads (H query heads in
G key/value groups). What to cut is measured, not guessed: run a few rows and see how much each channel or head adds to
what follows. The rest is copied into a smaller checkpoint that plain transformers loads.

Importance, over the real tokens of the calibration rows:

    FFN channel f of a layer      Σ_tokens |x_f| · ‖W_down[:, f]‖₂           x [F]: the input of the down projection
    query head h of a layer       Σ_tokens ‖W_O[:, h] a_h‖₂                  a_h [d]: the output of head h
    key/value group               the sum over its query heads
    residual channel c            Σ_norms mean_tokens |n_c|                  n [D]: the output of each norm of the model

FFN channels and heads are chosen per layer, residual channels once for the whole model, because the residual stream
joins all layers. Kept things keep their order.

The paper's: activation-based importance from a small calibration set, aggregated over tokens, per axis, and one pass
for all axes. Our choice: a channel counts by the length of what it adds to the residual stream (|x_f| times the
column it multiplies) rather than by |x_f| alone, which also makes it invariant to rescaling between the two matrices;
key/value groups are dropped whole, query heads by equal numbers in each kept group, as grouped attention demands.

Cost: one forward pass of the calibration rows; sums of L × (F + H) + D numbers.

Paper: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), NeurIPS 2024,
arXiv 2407.14679. Official code: github.com/NVlabs/Minitron (weights and recipes; pruning lives in NVIDIA's ModelOpt).
Inputs: a decoder in the llama layout (`self_attn.{q,k,v,o}_proj`, gated `mlp`), and batches of `input_ids`,
`attention_mask`. Relations: `layers.py` cuts depth, `mergeheads.py` merges key/value heads instead of dropping them.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residency.compress.decoder import decoder, uncached
from residency.compress.layers import Batch, model_inputs
from residency.compress.relufy import install_thresholds
from residency.errors import DataError, PlanError
from residency.modes import evaluating
from residency.progress import Progress

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Where the sizes of the config and the names of the parameters are known to mean what they say here. Gemma, for one,
scales its embeddings by the width, so that cutting it would change what enters the first layer."""
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.(.+)$")
_NORMS = ("layernorm", "norm")


@dataclass(frozen=True)
class Width:
    """Sizes to cut to; None leaves one as it is.

    Args:
        hidden: D, channels of the residual stream; a multiple of the query heads.
        heads: H, query heads per layer; a multiple of the key/value heads.
        kv_heads: G, key/value heads per layer.
        ffn: F, inner channels of every feed-forward layer.
    """

    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None

    def of(self, hidden: int, heads: int, kv_heads: int, ffn: int) -> Width:
        """The sizes that result for a model with these ones.

        Raises:
            PlanError: A size is larger than the model's, not positive, or the heads do not divide.
        """
        wanted = Width(self.hidden or hidden, self._heads(heads, kv_heads), self.kv_heads or kv_heads, self.ffn or ffn)
        for name, there in (("hidden", hidden), ("heads", heads), ("kv_heads", kv_heads), ("ffn", ffn)):
            if not 1 <= getattr(wanted, name) <= there:
                raise PlanError(
                    f"the student would have {name.replace('_', '-')}: {getattr(wanted, name)}, the model has {there}"
                )
        assert wanted.hidden is not None
        assert wanted.heads is not None
        assert wanted.kv_heads is not None
        if wanted.heads % wanted.kv_heads:
            raise PlanError(
                f"{wanted.heads} query heads cannot share {wanted.kv_heads} key/value heads equally",
                hint=f"heads must be a multiple of kv-heads, for instance heads: {wanted.kv_heads}",
            )
        if wanted.hidden % wanted.heads:
            raise PlanError(
                f"hidden: {wanted.hidden} is not a multiple of heads: {wanted.heads}, which transformers demands",
                hint=f"hidden: {max(1, wanted.hidden // wanted.heads) * wanted.heads}",
            )
        if wanted.heads // wanted.kv_heads > heads // kv_heads:
            raise PlanError(
                f"each key/value head would serve {wanted.heads // wanted.kv_heads} query heads, "
                f"but only {heads // kv_heads} of the model's share one",
                hint=f"kv-heads: {kv_heads}; or merge key/value heads first (merge-heads)",
            )
        return wanted

    def _heads(self, heads: int, kv_heads: int) -> int:
        """Query heads: as asked; or all those of the kept groups."""
        if self.heads is not None or self.kv_heads is None:
            return self.heads or heads
        return self.kv_heads * (heads // kv_heads)


@dataclass(frozen=True)
class Importance:
    """What `measure` found, float64 on the CPU.

    Args:
        hidden: [D].
        heads: [L, H].
        ffn: [L, F].
    """

    hidden: Tensor
    heads: Tensor
    ffn: Tensor


@torch.no_grad()
def measure(model: PreTrainedModel, batches: Iterable[Batch], progress: Progress | None = None) -> Importance:
    """How much each channel and head carries, summed over the real tokens of all batches.

    Args:
        model: A decoder in the llama layout; its mode is restored.
        batches: `input_ids` [B, T] and, unless nothing is padded, `attention_mask` [B, T].
        progress: Where to report; None is silent.

    Raises:
        DataError: There is no real token in the batches.
        PlanError: The model has another layout.
    """
    backbone, layers = decoder(model)
    H, d, F, D = _sizes(model)
    layer: Any
    heads, ffn = torch.zeros(len(layers), H, dtype=torch.float64), torch.zeros(len(layers), F, dtype=torch.float64)
    hidden, tokens = torch.zeros(D, dtype=torch.float64), 0
    real: Tensor

    def watch_heads(index: int, projection: nn.Linear) -> Callable[..., None]:
        blocks = projection.weight.detach().float().unflatten(1, (H, d)).transpose(0, 1)  # [H, D, d]
        gram = blocks.mT @ blocks  # ‖W a‖² = aᵀ WᵀW a, without forming W a

        def hook(module: nn.Module, args: tuple) -> None:
            a = args[0][real].float().unflatten(1, (H, d))
            length = torch.einsum("nhd,hde,nhe->nh", a, gram, a).clamp(min=0).sqrt()
            heads[index] += length.double().sum(0).cpu()

        return hook

    def watch_channels(index: int, projection: nn.Linear) -> Callable[..., None]:
        column = projection.weight.detach().float().norm(dim=0)

        def hook(module: nn.Module, args: tuple) -> None:
            ffn[index] += (args[0][real].float().abs().double().sum(0) * column).cpu()

        return hook

    def watch_norm(module: nn.Module, args: tuple, output: Tensor) -> None:
        hidden.add_(output[real].float().abs().double().sum(0).cpu())

    batches = list(batches)
    with evaluating(model), contextlib.ExitStack() as hooks:
        for index, layer in enumerate(layers):
            down, out = layer.mlp.down_proj, layer.self_attn.o_proj
            for handle in (
                out.register_forward_pre_hook(watch_heads(index, out)),
                down.register_forward_pre_hook(watch_channels(index, down)),
            ):
                hooks.callback(handle.remove)
        for name, module in backbone.named_modules():
            weight = getattr(module, "weight", None)
            if name.rsplit(".", 1)[-1].endswith(_NORMS) and weight is not None and weight.shape == (D,):
                hooks.callback(module.register_forward_hook(watch_norm).remove)
        with (progress or Progress()).task("importance of channels", len(batches)) as advance:
            for batch in batches:
                inputs = model_inputs(batch, model)
                real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
                backbone(**inputs, **uncached(model))
                tokens += int(real.sum())
                advance(1)
    if not tokens:
        raise DataError("no real token in the batches", hint="importance needs at least one row")
    return Importance(hidden / tokens, heads / tokens, ffn / tokens)


def narrow(model: PreTrainedModel, importance: Importance, width: Width) -> PreTrainedModel:
    """A new model with the most important channels and heads only.

    Args:
        model: A decoder in the llama layout; unchanged, and nothing is shared with the result.
        importance: See `measure`.
        width: The sizes to cut to.

    Returns:
        A model of the same class, device, dtype and mode, whose config describes it.

    Raises:
        PlanError: The sizes do not fit the model, or it has parameters of unknown shape.
    """
    H, d, F, D = _sizes(model)
    config: Any = copy.deepcopy(model.config)
    G = getattr(config, "num_key_value_heads", None) or H
    wanted = width.of(hidden=D, heads=H, kv_heads=G, ffn=F)
    assert wanted.hidden is not None
    assert wanted.heads is not None
    assert wanted.kv_heads is not None
    assert wanted.ffn is not None
    channels = _top(importance.hidden, wanted.hidden)
    inner = [_top(row, wanted.ffn) for row in importance.ffn]
    chosen = [choose_heads(row, G, wanted.heads, wanted.kv_heads) for row in importance.heads]
    config.hidden_size, config.intermediate_size, config.head_dim = wanted.hidden, wanted.ffn, d
    config.num_attention_heads, config.num_key_value_heads = wanted.heads, wanted.kv_heads
    state = {}
    for name, tensor in model.state_dict().items():
        found = _LAYER.search(name)
        index = int(found[1]) if found else 0
        groups, queries = chosen[index]
        axes = {
            "D": channels,
            "F": inner[index],
            "H": _blocks(queries, d),
            "G": _blocks(groups, d),
            "d": torch.arange(d),
            "V": None,
        }
        for axis, label in enumerate(_axes(found[2] if found else name, tensor)):
            if (chosen_here := axes[label]) is not None:
                tensor = tensor.index_select(axis, chosen_here.to(tensor.device))
        state[name] = tensor.clone()
    with torch.random.fork_rng(devices=[]):
        small: Any = type(model)(config)
    small.load_state_dict(state, strict=True)
    small.generation_config = copy.deepcopy(model.generation_config)
    install_thresholds(small)  # of FATReLU, which a model built from its config does not have
    return small.to(device=model.device, dtype=model.dtype).train(model.training)


def _top(importance: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` largest, ascending; of equals the earlier stays."""
    return importance.sort(descending=True, stable=True).indices[:keep].sort().values


def choose_heads(importance: Tensor, G: int, keep: int, keep_groups: int) -> tuple[Tensor, Tensor]:
    """The kept key/value heads, and the kept query heads: equally many in each kept group."""
    by_group = importance.view(G, -1)
    groups = _top(by_group.sum(1), keep_groups)
    queries = [int(g) * by_group.shape[1] + _top(by_group[g], keep // keep_groups) for g in groups]
    return groups, torch.cat(queries)


def _blocks(heads: Tensor, d: int) -> Tensor:
    return (heads[:, None] * d + torch.arange(d)).flatten()


def _axes(name: str, tensor: Tensor) -> str:
    """What each axis of a parameter counts: D, F, V, d, H (query rows) or G (key/value rows)."""
    module, _, kind = name.rpartition(".")
    module = module.rsplit(".", 1)[-1]
    matrices = {
        "embed_tokens": "VD",
        "lm_head": "VD",
        "q_proj": "HD",
        "k_proj": "GD",
        "v_proj": "GD",
        "o_proj": "DH",
        "gate_proj": "FD",
        "up_proj": "FD",
        "down_proj": "DF",
    }
    if module in matrices and kind in ("weight", "bias"):
        return matrices[module][: tensor.ndim]
    if module in ("q_norm", "k_norm") and tensor.ndim == 1:
        return "d"
    if module.endswith(_NORMS) and tensor.ndim == 1:
        return "D"
    raise PlanError(
        f"the parameter `{name}` {[*tensor.shape]} has no known place in a narrower model",
        hint="width pruning supports the llama layout: llama, mistral, qwen2, qwen3",
    )


def check_architecture(name: str) -> None:
    """Raise PlanError for a model that cannot be made narrower."""
    if name not in ARCHITECTURES:
        raise PlanError(
            f"a {name} cannot be made narrower",
            hint="width pruning knows llama, mistral, qwen2 and qwen3; fewer layers work for more models",
        )


def _sizes(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """H, d, F, D of a model in the llama layout."""
    check_architecture(type(model).__name__)
    config: Any = model.config
    heads = config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, d, config.intermediate_size, config.hidden_size
