"""A learned similarity of a vector and a prototype, instead of their cosine.

A two-layer network scores a pair, r(z, c) = w · ReLU(W [z; c]); it is trained by cross-entropy over the scores of all
C prototypes, with z and c detached, and then asked pair by pair: u_k = sigmoid(r(z, c_k)). Because the first layer is
linear and has no bias, W [z; c] = W_z z + W_c c: the two halves are computed once per vector and once per prototype and
added, which is exactly the same. The release multiplies out all pairs.

Cross-entropy does not see a constant added to all C scores of a row, and the threshold on u does: the metric is trained
as a softmax and read as a sigmoid. So it is in the release, and so it is here.

Cost: (B + C) × d × h multiplications and a [B, C, h] sum, instead of B × C × 2d × h.

Paper: Qin et al., FoPro, AAAI 2023, arXiv 2212.00465, after Sung et al., "Learning to Compare: Relation Network for
Few-Shot Learning", CVPR 2018, arXiv 1711.06025. Official code: github.com/yuleiqin/fopro, commit d0a6a72 (no licence;
read for facts).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Relation(nn.Module):
    """r(z, c).

    Args:
        width: d, of vectors and prototypes.
        hidden: h (the release's 128).
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.of_vector = nn.Linear(width, hidden, bias=False)
        self.of_prototype = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, 1, bias=False)
        both = torch.empty(hidden, 2 * width)
        nn.init.kaiming_uniform_(both)  # of the whole layer, as the release has it
        nn.init.kaiming_uniform_(self.out.weight)
        with torch.no_grad():
            self.of_vector.weight.copy_(both[:, :width])
            self.of_prototype.weight.copy_(both[:, width:])

    def forward(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """Scores [B, C] of vectors [B, d] and prototypes [C, d]."""
        pairs = self.of_vector(z)[:, None] + self.of_prototype(prototypes)[None]
        found: Tensor = self.out(pairs.relu())[..., 0]
        return found
