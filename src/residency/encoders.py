"""Frozen encoders under one interface: texts or images in, one vector each out.

    encoder = encoders.load(folder)            # a BERT-like folder (mean pooling), or an embedded image encoder
    vectors = encoder.encode(items)            # [N, D] float32 NumPy, in the order given

Texts are batched by length, so the padding is small; an item's vector does not depend on its batch (to float rounding).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from residency.bases import is_vision
from residency.errors import DataError
from residency.progress import Progress
from residency.rows import Row
from residency.trainable import Adapter, Pooling, pool


class Encoder(Protocol):
    """What selection and probes need of an encoder."""

    width: int

    def encode(self, items: Sequence[Any], batch: int = 64, progress: Progress | None = None) -> np.ndarray:
        """Vectors [N, D], float32."""
        ...


def load(folder: Path, device: str = "cpu") -> Encoder:
    """Load an encoder folder.

    Raises:
        DataError: When the folder holds no encoder.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: Encoder = (
        ImageEncoder(image_network(folder, device), device) if is_vision(config) else TextEncoder(folder, device)
    )
    adapter = Adapter.load(folder, config)
    return found if adapter is None else Adapted(found, adapter)


def item_of(row: Row) -> Any:
    """What an encoder takes of a row: the dialogue, the image, or the text."""
    if row.dialogue:
        return row.dialogue
    if row.image is None and row.text is None:
        raise DataError("the row has neither text nor image to classify", where=f"{row.source}:{row.line}")
    return row.image if row.image is not None else row.text


class TextEncoder:
    """The last hidden states, pooled as the folder says (by default their mean over real tokens), scaled to length 1.

    Texts, or dialogues as tuples of (speaker, text), which are rendered as `dialogues.render` does.

    Source: Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, arXiv 1908.10084.
    """

    max_tokens = 256

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        from residency.compat import quiet_transformers

        with quiet_transformers():
            self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.width = self.model.config.hidden_size
        self.device = device
        self.pooling: Pooling = getattr(self.model.config, "residency_pooling", "mean")
        self.max_tokens = getattr(self.model.config, "residency_max_tokens", self.max_tokens)
        self.turns: int = getattr(self.model.config, "residency_turns", 8)

    def ids(self, item: Any) -> list[int]:
        """Token ids of a text or a dialogue.

        Raises:
            DataError: For anything else.
        """
        if isinstance(item, tuple):
            from residency.dialogues import render

            return list(render(item, self.tokenizer, self.max_tokens, self.turns))
        if not isinstance(item, str) or item.startswith("data:image/"):
            raise DataError("a text encoder was given an image", where=str(item)[:40], hint="use an image base")
        return self.tokenizer(item, truncation=True, max_length=self.max_tokens)["input_ids"] or [0]

    @torch.no_grad()
    def encode(self, items: Sequence[Any], batch: int = 64, progress: Progress | None = None) -> np.ndarray:
        """See `Encoder.encode`."""
        ids = [self.ids(item) for item in items]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = np.zeros((len(ids), self.width), np.float32)
        with (progress or Progress()).task("embedding texts", len(ids)) as advance:
            for start in range(0, len(ids), batch):
                chosen = order[start : start + batch]
                longest = max(len(ids[i]) for i in chosen)
                tokens = torch.zeros((len(chosen), longest), dtype=torch.long)
                mask = torch.zeros((len(chosen), longest), dtype=torch.long)
                for row, i in enumerate(chosen):
                    tokens[row, : len(ids[i])] = torch.tensor(ids[i])
                    mask[row, : len(ids[i])] = 1
                tokens, mask = tokens.to(self.device), mask.to(self.device)
                hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
                vectors = pool(hidden, tokens, mask, self.pooling, self.tokenizer.mask_token_id)
                out[chosen] = torch.nn.functional.normalize(vectors, dim=-1).float().cpu().numpy()
                advance(len(chosen))
        return out


class ImageEncoder:
    """Features of an image network; images are paths, data: URIs, PIL images or [h, w(, 3)] arrays of 0…255.

    Args:
        network: See `images`: a module with `width`, `pixels` and `features`.
        device: Where it computes.
    """

    def __init__(self, network: Any, device: str = "cpu") -> None:
        self.model = network.to(device).eval()
        self.width: int = network.width
        self.device = device

    @torch.no_grad()
    def encode(self, items: Sequence[Any], batch: int = 64, progress: Progress | None = None) -> np.ndarray:
        """See `Encoder.encode`."""
        out = np.zeros((len(items), self.width), np.float32)
        with (progress or Progress()).task("embedding images", len(items)) as advance:
            for start in range(0, len(items), batch):
                pixels = self.model.pixels(items[start : start + batch])
                out[start : start + batch] = self.model.features(pixels.to(self.device)).float().cpu().numpy()
                advance(len(pixels))
        return out


class Adapted:
    """An encoder with a trained adapter behind it.

    Args:
        encoder: What it stands on.
        adapter: Of the same width.
    """

    def __init__(self, encoder: Encoder, adapter: Adapter) -> None:
        self.encoder, self.adapter, self.width = encoder, adapter, adapter.width

    @torch.no_grad()
    def encode(self, items: Sequence[Any], batch: int = 64, progress: Progress | None = None) -> np.ndarray:
        """See `Encoder.encode`."""
        frozen = torch.from_numpy(self.encoder.encode(items, batch, progress))
        return self.adapter(frozen).features.numpy()


def image_network(folder: Path, device: str = "cpu") -> Any:
    """The image network of a folder: an embedded one, or any that transformers loads."""
    from safetensors.torch import load_file

    from residency.efficientnet import IMAGE_ENCODERS
    from residency.images import HubVision

    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("residency_encoder")
    if name is None:
        return HubVision(folder, device)
    if name not in IMAGE_ENCODERS:
        raise DataError(f"unknown image encoder `{name}`", where=str(folder / "config.json"))
    network = IMAGE_ENCODERS[name]()
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return network.to(device).eval()


def principal_plane(points: np.ndarray) -> np.ndarray:
    """Points [N, D] on their first two principal components, [N, 2], rounded to three digits.

    The sign of each axis is fixed (its largest loading is positive), so that the picture does not depend on the
    LAPACK in use.
    """
    centred = np.asarray(points, np.float32)
    centred = centred - centred.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, [-1, -2]]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])
    return (centred @ axes).round(3)


def save_image_encoder(model: Any, name: str, folder: Path) -> None:
    """Save an embedded image network as safetensors with a config that `load` understands."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    config = {
        "residency_kind": "image-encoder",
        "residency_encoder": name,
        "architectures": [type(model).__name__],
        "features": model.width,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
