"""Encoders that can be trained: one vector per row, as `.features`.

Three of them: `TextFeatures`, a BERT-like encoder with its pooling; `ImageFeatures`, any network that `encoders` knows;
`Adapter`, a small residual network on the cached vectors of a frozen one. All answer with `Features`, which is what an
`Objective` with `wants = "features"` is given. What was trained is saved as an ordinary encoder folder: an adapter
stands in it as `adapter.safetensors`, and `encoders.load` puts it behind the encoder.

    Adapter: v = u + W₂ ReLU(W₁ u + b₁) + b₂,  u = (x − m) / s      (W₂, b₂ zero at first; m, s of the training rows)

The adapter's form is our choice: residual, so that training starts from what the frozen encoder knows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Pooling = Literal["mean", "first", "mask"]
"""Where a text's vector is read: mean over its tokens, the first token, or the (first) mask token."""


@dataclass
class Features:
    """Vectors [B, D]."""

    features: Tensor


class Adapter(nn.Module):
    """A residual layer on frozen features.

    Args:
        width: D.
        hidden: Of the layer inside; 0 leaves features as they are, standardised.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.width, self.hidden = width, hidden
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.inner = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) if hidden else None
        if self.inner is not None:
            last = self.inner[2]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def standardise(self, features: Tensor) -> Adapter:
        """Take mean and deviation from training rows [N, D]."""
        self.mean.copy_(features.float().mean(0))
        self.deviation.copy_(features.float().std(0, correction=0).clamp_min(1e-6))
        return self

    def forward(self, features: Tensor) -> Features:
        """[B, D] → `Features` [B, D]."""
        u = (features - self.mean) / self.deviation
        return Features(u if self.inner is None else u + self.inner(u))

    def save(self, folder: Path) -> None:
        """Write beside the encoder's files in `folder`."""
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "adapter.safetensors")
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["residency_adapter"] = {"width": self.width, "hidden": self.hidden}
        file.write_text(json.dumps(config, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> Adapter | None:
        """The adapter in a folder, given its config; None where there is none."""
        from safetensors.torch import load_file

        if (said := config.get("residency_adapter")) is None:
            return None
        found = cls(said["width"], said["hidden"])
        found.load_state_dict(load_file(folder / "adapter.safetensors"))
        return found.eval()


class TextFeatures(nn.Module):
    """A BERT-like encoder with its pooling, to be trained whole.

    Args:
        model: An `AutoModel`.
        pooling: See `Pooling`.
        mask_id: Id of the mask token; needed for pooling "mask".
    """

    def __init__(self, model: Any, pooling: Pooling = "mean", mask_id: int | None = None) -> None:
        super().__init__()
        if pooling == "mask" and mask_id is None:
            raise ValueError("pooling 'mask' needs a tokenizer with a mask token")
        self.model, self.pooling, self.mask_id = model, pooling, mask_id
        self.width: int = model.config.hidden_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Features:
        """Ids and mask [B, T] → `Features` [B, D]."""
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        return Features(pool(hidden, input_ids, attention_mask, self.pooling, self.mask_id))


class ImageFeatures(nn.Module):
    """An image network with a `features` method, to be trained whole.

    Args:
        network: Maps pixels [B, 3, h, w] to vectors [B, D] in `features`.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.width: int = network.width

    def forward(self, pixel_values: Tensor) -> Features:
        """[B, 3, h, w] → `Features` [B, D]."""
        return Features(self.network.features(pixel_values))


def pool(hidden: Tensor, ids: Tensor, mask: Tensor, pooling: Pooling, mask_id: int | None = None) -> Tensor:
    """States [B, T, D] → vectors [B, D].

    Raises:
        ValueError: For pooling "mask", when a row has no mask token.
    """
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "mask":
        there = ids.eq(torch.tensor(mask_id, device=ids.device))
        if not bool(there.any(1).all()):
            raise ValueError("a text without the mask token cannot be pooled there: use pooling 'mean' or 'first'")
        return hidden[torch.arange(len(hidden), device=hidden.device), there.int().argmax(1)]
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
