"""ReLU-fication: gated feed-forward layers whose activation is exactly zero for most of their units.

The idea. A gated layer (SwiGLU, GEGLU) computes, for one token x [D],

    s = σ(W_gate x) [F]      x₁ = s ⊙ (W_up x) [F]      FFN(x) = W_down x₁ [D]

With SiLU or GELU nothing in s is exactly zero, so all of W_up and W_down must be read. With σ = ReLU a unit whose gate
is negative contributes nothing whatever its other weights are, and a decoder may leave them where they lie
(`sparseffn.py`). FATReLU moves the bar from 0 to a threshold t ≥ 0, which silences the units that barely speak:

    FATReLU_t(z) = z if z ≥ t else 0,       FATReLU_0 = ReLU

Substitution changes the model badly (SmolLM2-135M: 3.1 → 8.3 nats per token) until it is trained again
(`prosparse.py`); the threshold is shifted after that, without training (`fatrelu.py` chooses it).

The paper's: the substitution, and one threshold for the whole model, applied to the gate before the product. At z = t
the paper keeps the unit and its official kernel drops it; here it is kept. `torch.nn.functional.threshold` drops it
too. Our choice: thresholds may differ per layer; a NaN stays a NaN.

The checkpoint stays standard. `hidden_act` (`hidden_activation` in Gemma 2 and 3) becomes "relu", which every
transformers model reads. Thresholds are saved beside it as `fatrelu_threshold`, one per layer: `residency` installs
them again when it loads the model (`install_thresholds`); plain transformers does not know the key and computes t = 0.

Cost: none; the substitution touches no weight.

Paper: Song, Han, Zhang et al., "ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large
Language Models", COLING 2025, arXiv 2402.13516. Training code: none released; operators:
github.com/Raincleared-Song/sparse_gpu_operator, commit 1f0b9af (no licence file: read, not copied).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residency.compress.decoder import decoder
from residency.errors import DataError, PlanError

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""What a gated feed-forward module is made of, in transformers' names."""
ACTIVATION_KEYS = ("hidden_act", "hidden_activation")
"""Where a config says σ."""
THRESHOLD_KEY = "fatrelu_threshold"
"""Where a config keeps the thresholds, one per layer."""


class FATReLU(nn.Module):
    """z where z ≥ threshold, else 0, element by element.

    Args:
        threshold: t ≥ 0, in the units of the gate. Rounded to the dtype of z before the comparison.

    Raises:
        ValueError: For a threshold that is negative or not finite.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = _checked(threshold)

    def forward(self, z: Tensor) -> Tensor:
        """Apply it; the gradient is 1 where z was kept and 0 elsewhere."""
        return z.masked_fill(z < self.threshold, 0)

    def extra_repr(self) -> str:
        """The threshold, for `print(model)`."""
        return f"threshold={self.threshold:g}"


def gated_ffns(model: Any) -> list[Any]:
    """The gated feed-forward module of every decoder layer, in order.

    Args:
        model: A transformers causal language model, or a PEFT model around one.

    Returns:
        One module per layer, with `gate_proj`, `up_proj`, `down_proj` and `act_fn`.

    Raises:
        PlanError: For a model without gated layers, with fused gate and up projections, or with experts.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = []
    for place, layer in enumerate(decoder(model)[1]):
        gated = [m for m in layer.modules() if all(callable(getattr(m, part, None)) for part in PARTS)]
        others = [m for m in layer.modules() if hasattr(m, "act_fn") and m not in gated]
        if len(gated) != 1 or others:
            what = "several feed-forward modules (experts)" if gated else "no gated feed-forward module"
            raise PlanError(
                f"layer {place} of a {type(model).__name__} has {what}",
                hint=f"supported are layers with one {', '.join(PARTS)}, as in llama, qwen2, qwen3, mistral and gemma",
            )
        found.append(gated[0])
    return found


def relufy(model: Any, threshold: float | Sequence[float] = 0.0) -> Any:
    """Exchange the activation of every gated layer for ReLU, or FATReLU where a threshold is given.

    Args:
        model: A causal language model with gated layers; changed in place, weights untouched.
        threshold: One for all layers, or one per layer.

    Returns:
        The model.

    Raises:
        PlanError: For a model without gated layers, or one that does not read its activation from the config; it is
            unchanged then.
    """
    ffns, text = gated_ffns(model), _text_config(model)
    before = {key: getattr(text, key) for key in ACTIVATION_KEYS if hasattr(text, key)}
    vars(text).update(dict.fromkeys(before, "relu"))
    try:
        _check_saved(model)
    except PlanError:
        vars(text).update(before)
        raise
    for ffn in ffns:
        ffn.act_fn = nn.ReLU()
    return set_thresholds(model, threshold)


def thresholds(model: Any) -> list[float]:
    """The threshold of every layer, 0 for ReLU.

    Raises:
        PlanError: When a layer has another activation.
    """
    found = []
    for place, ffn in enumerate(gated_ffns(model)):
        if not isinstance(ffn.act_fn, nn.ReLU | FATReLU):
            raise PlanError(
                f"the activation of layer {place} is {type(ffn.act_fn).__name__}, which is never exactly zero",
                hint="relufy(model) first, and train it (the recipe step `sparsify` does both)",
            )
        found.append(getattr(ffn.act_fn, "threshold", 0.0))
    return found


def set_thresholds(model: Any, threshold: float | Sequence[float]) -> Any:
    """Install thresholds on a model with ReLU or FATReLU layers, and write them into its config.

    Args:
        model: Changed in place.
        threshold: One for all layers, or one per layer; 0 makes a layer plain ReLU.

    Returns:
        The model.

    Raises:
        PlanError: When the model's activation is another one.
        ValueError: For thresholds that are negative, not finite, or not as many as layers.
    """
    count = len(thresholds(model))
    given = [threshold] * count if isinstance(threshold, int | float) else list(threshold)
    if len(given) != count:
        raise ValueError(f"{len(given)} thresholds for {count} layers; give one, or one per layer")
    given = [_checked(t) for t in given]
    for ffn, t in zip(gated_ffns(model), given, strict=True):
        ffn.act_fn = FATReLU(t) if t else nn.ReLU()
    text = _text_config(model)
    vars(text).pop(THRESHOLD_KEY, None)
    if any(given):
        setattr(text, THRESHOLD_KEY, given)
    return model


def install_thresholds(model: Any) -> Any:
    """Install the thresholds that a loaded model's config carries; a model without them is returned as it is.

    Raises:
        DataError: When they do not fit the model: the config was edited.
    """
    config: Any = getattr(model, "config", None)
    given = getattr(config.get_text_config(), THRESHOLD_KEY, None) if hasattr(config, "get_text_config") else None
    if given is None:
        return model
    try:
        return set_thresholds(model, given)
    except (PlanError, ValueError, TypeError) as error:
        raise DataError(
            f"`{THRESHOLD_KEY}` in config.json does not fit the model: {str(error).splitlines()[0]}",
            hint=f"remove the key to load the model with plain ReLU, or give one number ≥ 0 per layer beside "
            f'"{ACTIVATION_KEYS[0]}": "relu"',
        ) from error


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _checked(threshold: float) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise ValueError(f"a threshold is a number, got {threshold!r}")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"a threshold is finite and not negative, got {threshold}")
    return float(threshold)


def _check_saved(model: Any) -> None:
    """Raise unless a model built from the config as it would be saved has ReLU in all its gated layers."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        again = type(model)(config)
    if other := {type(ffn.act_fn).__name__ for ffn in gated_ffns(again)} - {"ReLU"}:
        raise PlanError(
            f"a {type(model).__name__} does not read its activation from {' or '.join(ACTIVATION_KEYS)}: loaded again "
            f"it would have {', '.join(sorted(other))}",
            hint="choose a base whose config names the activation, such as llama, qwen2, mistral or gemma",
        )
