"""Vectors of earlier batches, in ring buffers: one ring for all rows, or one per class.

A loss that contrasts within a batch sees B − 1 others; with a queue of earlier batches' vectors (detached) it sees
thousands at the cost of one matrix product. `RingQueue` forgets the oldest; `ClassQueue` keeps the latest M vectors of
every class, so that rare classes are not pushed out by frequent ones. Both are buffers, written without a Python loop.

Cost: Q × D or C × M × D numbers; a push is one indexed copy.

Papers: He et al., "Momentum Contrast", CVPR 2020, arXiv 1911.05722 (one queue); Song et al., SPCL, EMNLP 2022, arXiv
2210.08713 (one per class).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RingQueue(nn.Module):
    """The latest Q vectors, whoever they are of.

    Args:
        size: Q.
        width: D.
        payload: Width P of further numbers kept with each vector; 0 for none.

    Attributes:
        vectors: [Q, D].
        payloads: [Q, P].
        pushed: How many were pushed ever.
    """

    vectors: Tensor
    payloads: Tensor
    pushed: Tensor

    def __init__(self, size: int, width: int, payload: int = 0) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue holds at least one vector, not {size}")
        self.register_buffer("vectors", torch.zeros(size, width))
        self.register_buffer("payloads", torch.zeros(size, payload))
        self.register_buffer("pushed", torch.tensor(0))

    def __len__(self) -> int:
        return min(int(self.pushed), len(self.vectors))

    @torch.no_grad()
    def push(self, z: Tensor, payload: Tensor | None = None) -> None:
        """Add vectors [B, D] (and payloads [B, P]), the last of them the newest."""
        size = len(self.vectors)
        skipped = max(0, len(z) - size)
        at = (int(self.pushed) + torch.arange(skipped, len(z), device=self.vectors.device)) % size
        self.vectors[at] = z[skipped:].detach().to(self.vectors.dtype)
        if payload is not None:
            self.payloads[at] = payload[skipped:].detach().to(self.payloads.dtype)
        self.pushed += len(z)

    @property
    def filled(self) -> Tensor:
        """[min(pushed, Q), D] what is there, in no particular order."""
        return self.vectors[: len(self)]

    @property
    def filled_payloads(self) -> Tensor:
        """[min(pushed, Q), P], row for row those of `filled`."""
        return self.payloads[: len(self)]


class ClassQueue(nn.Module):
    """The latest M vectors of every class.

    Args:
        classes: C.
        size: M.
        width: D.

    Attributes:
        vectors: [C, M, D].
        pushed: [C] how many were pushed ever.
    """

    vectors: Tensor
    pushed: Tensor

    def __init__(self, classes: int, size: int, width: int) -> None:
        super().__init__()
        if classes < 1 or size < 1:
            raise ValueError(f"a queue needs at least one class and one place, got {classes} and {size}")
        self.register_buffer("vectors", torch.zeros(classes, size, width))
        self.register_buffer("pushed", torch.zeros(classes, dtype=torch.long))

    @property
    def count(self) -> Tensor:
        """[C] vectors there are of every class."""
        return self.pushed.clamp_max(self.vectors.shape[1])

    def clear(self) -> None:
        """Forget everything."""
        self.pushed.zero_()

    @torch.no_grad()
    def push(self, z: Tensor, y: Tensor) -> None:
        """Add vectors [B, D] of classes [B], in order."""
        classes, size, _ = self.vectors.shape
        member = nn.functional.one_hot(y, classes)  # [B, C]
        before = member.cumsum(0).gather(1, y[:, None])[:, 0] - 1  # rows of the same class earlier in the batch
        latest = before >= member.sum(0)[y] - size  # what the batch itself would overwrite is not written
        at = (self.pushed[y] + before) % size
        self.vectors[y[latest], at[latest]] = z[latest].detach().to(self.vectors.dtype)
        self.pushed += member.sum(0)

    def draw(self, k: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The mean of k vectors per class, drawn without replacement.

        Args:
            k: K, at most M.
            generator: Where random numbers come from, by default torch's own.

        Returns:
            Means [C, D], and [C] bool: which classes have K vectors (the others' means are 0).

        Raises:
            ValueError: When K is larger than the queue.
        """
        classes, size, _ = self.vectors.shape
        if not 1 <= k <= size:
            raise ValueError(f"a queue of {size} per class cannot give {k}")
        noise = torch.rand(classes, size, generator=generator).to(self.vectors.device)
        there = torch.arange(size, device=self.vectors.device) < self.count[:, None]
        chosen = noise.masked_fill(~there, -1).topk(k, dim=1).indices
        means = self.vectors[torch.arange(classes, device=chosen.device)[:, None], chosen].mean(1)
        enough = self.count >= k
        return means.masked_fill(~enough[:, None], 0.0), enough
