"""Images in: opened from wherever a row keeps them, changed at random for a second view, seen by any vision network.

A network here is a module with `width`, `pixels(images) -> [B, 3, h, w]` and `features(pixels) -> [B, width]`:

- the embedded ones (`efficientnet.py`), scaled to their own square size;
- any vision model that transformers loads (ViT, DINOv2, ConvNeXt, Swin, ResNet, and timm's through its wrapper), with
  the preprocessing that its folder names. Its vector is the first token of the last layer where that is a sequence
  (the class token), the mean over places where it is a map, and the pooled output where the wrapper gives one.

Random views are crops of 60 to 100 % of the area, turned by up to ten degrees, with brightness, contrast and colour
changed by up to 40 %; mirrored only on request, because mirrored digits and letters are other ones (our choice).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from residency.errors import DataError, MissingError


def open_image(item: Any) -> Any:
    """A path, data: URI, array [h, w(, 3)] of 0…255 or PIL image as a PIL image in RGB.

    Raises:
        DataError: When it is missing or cannot be decoded.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise MissingError("images need `pillow`", hint="pip install 'residency[vision]'") from None
    try:
        if isinstance(item, Image.Image):
            image: Any = item
        elif isinstance(item, np.ndarray):
            image = Image.fromarray(item.astype(np.uint8))
        elif isinstance(item, str) and item.startswith("data:"):
            image = Image.open(io.BytesIO(base64.b64decode(item.partition(",")[2])))
        else:
            image = Image.open(item)
        return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise DataError(f"the image cannot be read: {error}", where=str(item)[:80]) from None


def data_uri(image: Any, side: int | None = None) -> str:
    """A PIL image as a data: URI (PNG), scaled down so that neither side is longer than `side`."""
    if side is not None and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@lru_cache(maxsize=4096)
def thumbnail(item: str, side: int = 96) -> str:
    """A small data: URI of an image by its path or URI; empty where it cannot be read."""
    try:
        return data_uri(open_image(item), side)
    except DataError:
        return ""


def changed(image: Any, generator: np.random.Generator, mirror: bool = False) -> Any:
    """One random view of a PIL image, of the same size."""
    from PIL import Image, ImageEnhance

    width, height = image.size
    share, ratio = generator.uniform(0.6, 1.0), np.exp(generator.uniform(-0.2, 0.2))
    w = int(np.clip(round(width * np.sqrt(share) * ratio), 1, width))
    h = int(np.clip(round(height * np.sqrt(share) / ratio), 1, height))
    left, top = generator.integers(0, width - w + 1), generator.integers(0, height - h + 1)
    turned = image.rotate(generator.uniform(-10, 10), Image.Resampling.BILINEAR, fillcolor=_edge(image))
    view = turned.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BILINEAR)
    if mirror and generator.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhancer(view).enhance(generator.uniform(0.6, 1.4))
    return view


def _edge(image: Any) -> tuple[int, ...]:
    """The colour of the corners: what a turned image is filled up with."""
    w, h = image.size
    corners = np.array([image.getpixel(at) for at in ((0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1))])
    return tuple(int(v) for v in np.median(corners, axis=0))


class HubVision(nn.Module):
    """A vision model of transformers.

    Args:
        folder: Standard form, with its preprocessor_config.json.
        device: Where it computes.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        from residency.compat import quiet_transformers

        with quiet_transformers():
            try:
                self.model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
                self.processor = AutoImageProcessor.from_pretrained(folder)
            except ImportError as error:
                raise MissingError(
                    f"this image encoder needs another package: {str(error).strip().splitlines()[0]}",
                    hint="timm models: pip install timm torchvision",
                ) from None
            except (OSError, ValueError, TypeError) as error:
                raise DataError(
                    f"transformers cannot load this image encoder: {str(error).strip().splitlines()[0]}",
                    where=str(folder),
                    hint="its folder needs config.json, safetensors and preprocessor_config.json",
                ) from error
        with torch.no_grad():
            blank = self.pixels([np.zeros((32, 32, 3), np.uint8)]).to(device)
            self.width: int = self.features(blank).shape[1]

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Preprocessed images [B, 3, h, w]."""
        found: Tensor = self.processor([open_image(image) for image in images], return_tensors="pt")["pixel_values"]
        return found

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] → [B, D]."""
        out = self.model(pixel_values=pixels)
        states = out.last_hidden_state
        if self.model.config.model_type == "timm_wrapper":
            return out.pooler_output
        return states[:, 0] if states.dim() == 3 else states.flatten(2).mean(-1)

    def save(self, folder: Path) -> None:
        """Write in standard form."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
