"""A key/value cache for trees: buffers made once, rows of their own length, and acceptance as a move of few entries.

transformers' `DynamicCache` concatenates, which copies the whole cache at every step, and its rows all have one
length. Here every layer owns a buffer [B, G, S, d]; a forward pass of n nodes writes them behind each row's last
certain entry, and `accept` keeps those on the accepted path by moving them together. What lies behind a row's length is
rubbish that the next pass overwrites and no mask ever shows. The buffer doubles when it is full.

The model sees a `transformers.Cache`: a prompt is read through it with the model's own masks. But entries count only
when they are declared certain (`advance`, `accept`), so it is for the decoding loop and not for `generate`; users get
a `DynamicCache` back (`plain`). `tree_mask` gives the mask of a tree pass, additive, since a boolean one is silently
wrong under eager attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer


class SlotLayer(CacheLayerMixin):
    """One layer's buffer; lengths are the cache's."""

    is_sliding = False
    is_compileable = False

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers: [B, G, S, d] like the first states."""
        self.keys = _buffer(key_states, self.owner.capacity)
        self.values = _buffer(value_states, self.owner.capacity)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, G, n, d] behind every row's end; returns all that is there, [B, G, longest + n, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        lengths, n = self.owner.lengths, key_states.shape[-2]
        end = max(lengths) + n
        if end > self.keys.shape[-2]:
            self.keys, self.values = _grown(self.keys, end), _grown(self.values, end)
        if min(lengths) == max(lengths):
            self.keys[:, :, lengths[0] : end] = key_states
            self.values[:, :, lengths[0] : end] = value_states
        else:
            for row, start in enumerate(lengths):
                self.keys[row, :, start : start + n] = key_states[row]
                self.values[row, :, start : start + n] = value_states[row]
        return self.keys[:, :, :end], self.values[:, :, :end]

    def move(self, row: int, sources: Tensor, start: int) -> None:
        """Bring a row's entries at slots `sources` together, from slot `start` on."""
        assert self.keys is not None
        assert self.values is not None
        for buffer in (self.keys, self.values):
            buffer[row, :, start : start + len(sources)] = buffer[row, :, sources]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a mask has to cover."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Entries of the longest row."""
        return max(self.owner.lengths)

    def get_max_length(self) -> int:
        """No fixed end."""
        return -1


class SlotCache(Cache):
    """Buffers for all layers of a model.

    Args:
        layers: Number of layers.
        batch: B.
        capacity: Slots to begin with.
    """

    def __init__(self, layers: int, batch: int, capacity: int) -> None:
        self.lengths = [0] * batch
        self.capacity = max(1, capacity)
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def advance(self, counts: Sequence[int] | int) -> None:
        """Declare the last pass's first `counts` entries of each row certain."""
        counts = [counts] * len(self.lengths) if isinstance(counts, int) else counts
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep, of the tree just read, the columns on each row's path (root first), in this order."""
        for row, path in enumerate(paths):
            start, first = self.lengths[row], _in_place(path)
            if first < len(path):
                for layer in self.layers:
                    assert isinstance(layer, SlotLayer)
                    assert layer.keys is not None
                    sources = torch.tensor(path[first:], device=layer.keys.device) + start
                    layer.move(row, sources, start + first)
        self.advance([len(path) for path in paths])

    def plain(self, into: DynamicCache) -> DynamicCache | None:
        """Copy what is certain into transformers' own cache, in place of what that holds; None where rows differ."""
        if len(set(self.lengths)) > 1:
            return None
        end, theirs = self.lengths[0], cast(list[Any], into.layers)
        for i, layer in enumerate(cast(list[SlotLayer], self.layers)):
            assert layer.keys is not None
            assert layer.values is not None
            keys, values = layer.keys[:, :, :end].clone(), layer.values[:, :, :end].clone()
            if theirs[i : i + 1] and theirs[i].is_initialized:
                theirs[i].keys, theirs[i].values = keys, values
            else:
                into.update(keys, values, i)
        return into

    @classmethod
    def of(cls, cache: Cache, capacity: int) -> SlotCache:
        """Take over what another cache holds (one length for all rows)."""
        if isinstance(cache, cls):
            return cache
        length = cache.get_seq_length()
        batch = cache.layers[0].keys.shape[0] if length else 1  # type: ignore[union-attr]
        made = cls(len(cache.layers), batch, max(capacity, length))
        if length:
            for old, new in zip(cache.layers, made.layers, strict=True):
                assert isinstance(new, SlotLayer)
                if (
                    not isinstance(old, DynamicLayer)
                    or old.keys is None
                    or old.values is None
                    or len(old.keys[0, 0]) != length
                ):
                    raise ValueError("only a dynamic cache whose layers all hold every token can be drafted from")
                new.update(old.keys, old.values)
            made.advance(length)
        return made


def tree_mask(seen: Tensor, lengths: Sequence[int], inner: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of a tree pass.

    Args:
        seen: [B, S] bool: which slots hold real tokens (padding does not); only slots below a row's length count.
        lengths: Certain entries per row.
        inner: [B, n, n] bool: which nodes each node may see.
        dtype: Of the attention.

    Returns:
        [B, 1, n, longest + n], 0 where a node may look.
    """
    B, n, _ = inner.shape
    end = max(lengths) + n
    allowed = torch.zeros(B, n, end, dtype=torch.bool, device=inner.device)
    for row, length in enumerate(lengths):
        allowed[row, :, :length] = seen[row, :length]
        allowed[row, :, length : length + n] = inner[row]
    mask = torch.zeros(B, 1, n, end, dtype=dtype, device=inner.device)
    return mask.masked_fill_(~allowed[:, None], torch.finfo(dtype).min)


def _in_place(path: Sequence[int]) -> int:
    """How many leading columns of a path lie where they belong already."""
    return next((i for i, column in enumerate(path) if i != column), len(path))


def _buffer(like: Tensor, slots: int) -> Tensor:
    B, G, n, d = like.shape
    return like.new_zeros(B, G, max(slots, n), d)


def _grown(old: Tensor, needed: int) -> Tensor:
    new = _buffer(old, max(needed, 2 * old.shape[-2]))
    new[:, :, : old.shape[-2]] = old
    return new
