"""Frozen encoders under one interface: texts or images in, one vector each out.

    encoder = encoders.load(folder)            # a BERT-like folder (mean pooling), or an embedded image encoder
    vectors = encoder.encode(items)            # [N, D] float32 NumPy, in the order given

Texts are batched by length, so the padding is small; an item's vector does not depend on its batch (to float rounding).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from residency.errors import DataError, MissingError
from residency.progress import Progress
from residency.rows import Row


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
    if "residency_encoder" in config:
        return ImageEncoder(folder, config["residency_encoder"], device)
    return TextEncoder(folder, device)


def item_of(row: Row) -> Any:
    """What an encoder takes of a row: the image, or the text."""
    if row.image is None and row.text is None:
        raise DataError("the row has neither text nor image to classify", where=f"{row.source}:{row.line}")
    return row.image if row.image is not None else row.text


class TextEncoder:
    """Mean of the last hidden states over real tokens, scaled to length 1.

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

    @torch.no_grad()
    def encode(self, items: Sequence[str], batch: int = 64, progress: Progress | None = None) -> np.ndarray:
        """See `Encoder.encode`."""
        if strange := next((t for t in items if not isinstance(t, str) or t.startswith("data:image/")), None):
            raise DataError("a text encoder was given an image", where=str(strange)[:40], hint="use an image base")
        ids = [self.tokenizer(t, truncation=True, max_length=self.max_tokens)["input_ids"] or [0] for t in items]
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
                weight = mask[..., None].to(hidden.dtype)
                mean = (hidden * weight).sum(1) / weight.sum(1)
                out[chosen] = torch.nn.functional.normalize(mean, dim=-1).float().cpu().numpy()
                advance(len(chosen))
        return out


class ImageEncoder:
    """Pooled features of an embedded image network; images are paths, data: URIs or [h, w(, 3)] arrays of 0…255."""

    def __init__(self, folder: Path, name: str, device: str = "cpu") -> None:
        from safetensors.torch import load_file

        from residency.efficientnet import IMAGE_ENCODERS

        if name not in IMAGE_ENCODERS:
            raise DataError(f"unknown image encoder `{name}`", where=str(folder / "config.json"))
        self.model: Any = IMAGE_ENCODERS[name]()
        self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        self.model.to(device).eval()
        self.width: int = self.model.width
        self.size: int = self.model.size
        self.device = device

    @torch.no_grad()
    def encode(self, items: Sequence[Any], batch: int = 64, progress: Progress | None = None) -> np.ndarray:
        """See `Encoder.encode`."""
        out = np.zeros((len(items), self.width), np.float32)
        with (progress or Progress()).task("embedding images", len(items)) as advance:
            for start in range(0, len(items), batch):
                images = np.stack([decode_image(item, self.size) for item in items[start : start + batch]])
                pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) - self.model.mean) / self.model.scale
                out[start : start + batch] = self.model.features(pixels.to(self.device)).float().cpu().numpy()
                advance(len(images))
        return out


def decode_image(item: Any, size: int) -> np.ndarray:
    """An image as [size, size, 3] float32, 0…255.

    Raises:
        DataError: When it is missing or cannot be decoded.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise MissingError("images need `pillow`", hint="pip install 'residency[vision]'") from None
    try:
        if isinstance(item, np.ndarray):
            image = Image.fromarray(item.astype(np.uint8))
        elif isinstance(item, str) and item.startswith("data:"):
            image = Image.open(io.BytesIO(base64.b64decode(item.partition(",")[2])))
        else:
            image = Image.open(item)
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), np.float32)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise DataError(f"the image cannot be read: {error}", where=str(item)[:80]) from None


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
