"""One layer of an `EvictingCache`: keys and values in a buffer that is allocated once, survivors gathered to its front.

transformers reads `keys` and `values`, which are views of the first `length` rows of a buffer [B, G, rows, d]; its own
layers concatenate, which copies everything for every token. Whether keys are stored where they stand or unrotated is
said by the `Frame` that all layers of a cache share; see `evictioncache` for why, and for whose ideas these are.

Cost: appending T states writes T rows; dropping entries reads and writes the survivors once; a loosened pass turns the
stored keys once per layer, [B, G, S, d] numbers that live until the layer is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from residency.infer.rotation import Angles, turn


@dataclass
class Frame:
    """What all layers share: whether keys are stored unrotated, the angles of the next pass, positions given up."""

    loose: bool = False
    stored: Angles | None = None
    fresh: Angles | None = None
    offset: int = 0
    absolute: bool = False


class EvictingLayer(DynamicLayer):
    """One layer's keys and values in a buffer of fixed size that grows only when it must.

    Args:
        frame: Shared by the layers of a cache.
        rows: Entries to allocate for.
        turned: Whether this layer rotates its keys.
    """

    def __init__(self, frame: Frame, rows: int, turned: bool) -> None:
        self.buffers: list[Tensor] = []
        self.length, self.rows, self.turned, self.frame = 0, rows, turned, frame
        self.origin: Tensor | None = None  # [B, g, S], which token of its row an entry was
        self.scores: Tensor | None = None  # [B, g, S], what a policy carries from pass to pass
        super().__init__()

    @property
    def keys(self) -> Any:
        """Keys [B, G, S, d], a view of the buffer; None before the first pass."""
        return self.buffers[0][:, :, : self.length] if self.buffers else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._put(0, value)

    @property
    def values(self) -> Any:
        """Values [B, G, S, d], a view of the buffer; None before the first pass."""
        return self.buffers[1][:, :, : self.length] if self.buffers else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._put(1, value)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers in the type and on the device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = max(self.rows, key_states.shape[2])
        self.buffers = [s.new_empty(s.shape[0], s.shape[1], rows, s.shape[3]) for s in (key_states, value_states)]
        self.length, self.is_initialized = 0, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states [B, G, T, d] with rotated keys; return all of them as attention needs them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, end = self.length, self.length + key_states.shape[2]
        self.reserve(end)
        keys, values = self.buffers
        loose = self.frame.loose and self.turned
        fresh = turn(key_states, self._angles(self.frame.fresh), back=True) if loose else key_states
        keys[:, :, before:end], values[:, :, before:end] = fresh, value_states
        self.length = end
        if not loose or before == 0:
            return (key_states if before == 0 else self.keys), self.values
        placed = turn(keys[:, :, :before], self._angles(self.frame.stored))
        return torch.cat([placed, key_states], 2), self.values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append states as they are to be stored."""
        end = self.length + keys.shape[2]
        self.reserve(end)
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end

    def reserve(self, rows: int, *, exact: bool = False) -> None:
        """Make room for so many entries; `exact` also gives back what is beyond that."""
        have = self.buffers[0].shape[2]
        if have < rows:
            rows = rows if exact else max(rows, have + have // 4 + 64)
        elif not exact or have == rows:
            return
        for i, old in enumerate(self.buffers):
            self.buffers[i] = old.new_empty(*old.shape[:2], rows, old.shape[3])
            self.buffers[i][:, :, : self.length] = old[:, :, : self.length]

    def select(self, index: Tensor, steps: Angles | None) -> None:
        """Keep the entries of an index [B, 1 or G, W], in that order, their keys turned by `steps`."""
        width, held = index.shape[2], self.length
        for i, buffer in enumerate(self.buffers):
            at = index[..., None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            kept = buffer[:, :, : self.length].gather(2, at)
            if i == 0 and steps is not None and self.turned:
                kept = turn(kept, steps)
            buffer[:, :, :width] = kept
        self.length = width
        for name in ("origin", "scores"):
            if (old := getattr(self, name)) is not None:
                old = torch.nn.functional.pad(old, (0, held - old.shape[2]))  # entries nobody has scored yet
                heads = max(old.shape[1], index.shape[1])
                wide = index.expand(-1, heads, -1)
                setattr(self, name, old.expand(-1, heads, -1).gather(2, wide))

    def settle(self, angles: Angles, back: bool) -> None:
        """Turn all stored keys to their places, or back."""
        if self.turned and self.length:
            self.buffers[0][:, :, : self.length] = turn(self.keys, angles, back)

    def get_seq_length(self) -> int:
        """Entries held; counted from the start of the conversation when the cache is `absolute`."""
        return self.frame.offset + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the attention mask, and how many lie before the first of them."""
        return self.length + query_length, self.frame.offset

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last entries; the number is not positive, as everywhere in transformers 5."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.buffers, self.length, self.is_initialized = [], 0, False
        self.origin = self.scores = None

    def nbytes(self) -> int:
        """Bytes of the buffers, used or not."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers)

    def _put(self, index: int, value: Tensor | None) -> None:
        if value is None:
            self.buffers, self.length = [], 0
            return
        if not self.buffers:
            self.buffers = [value, value]
        self.buffers[index], self.length = value, value.shape[2]

    def _angles(self, angles: Angles | None) -> Angles:
        if angles is None:
            raise RuntimeError("a loosened cache was used outside `prefill`: its keys are not at their places")
        return angles
