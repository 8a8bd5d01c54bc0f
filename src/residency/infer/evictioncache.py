"""A key/value cache whose entries can be dropped, and what is left moves together: positions 0, 1, 2, … again.

It is a `DynamicCache` of transformers, so `generate` and `forward` take it. Every layer keeps keys and values in one
buffer [B, G, rows, d] that is allocated once; what transformers sees as `keys` and `values` are views of its first
rows. Dropping entries gathers the survivors of a layer to the front of its buffer and turns their keys to their new
positions (`rotation.turn`). Layers, and key/value heads where a policy says so, may keep different tokens; all of them
keep equally many, so one mask `real` [B, S] and one row of positions serve all.

While a long text is being read, entries move after every chunk. Turning a bfloat16 key again and again would round it
every time; so inside `loosened` keys are stored unrotated and turned to their place when they are used: two roundings
in all, however often they move. The official code of CItruS stores them so for good, which costs a turn of all keys
for every decoded token; here they are turned to their places once when the block ends.

Rows of a batch may hold different numbers of entries: the spare places are at the left and not `real`. transformers
counts positions from the attention mask, so a row is what it would be alone. `columns` counts every token position
the cache has seen, evicted or not, which is what `generate` counts when it is given a whole conversation (`absolute`).

Memory: 2 · L · B · G · rows · d elements, plus 4 bytes per entry, layer and chosen head that say which token it was.
Source: the layers of transformers 5.23 (cache_utils.py); positions as in StreamingLLM (arXiv 2309.17453). The buffer,
the unrotated store and the mask are our choice. Relations: `prefill` reads text into it, `eviction` chooses what to
keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from residency.errors import PlanError
from residency.infer.evictinglayer import EvictingLayer, Frame
from residency.infer.rotation import Rotation


class EvictingCache(DynamicCache):
    """Keys and values of every layer, which tokens they are, and at which positions they stand.

    Args:
        rotation: How the model rotates its keys (`rotation_of`).
        rows: Entries to allocate for, per row of the batch and layer.
    """

    def __init__(self, rotation: Rotation, rows: int = 0) -> None:
        self.rotation, self.frame = rotation, Frame()
        Cache.__init__(self, layers=[EvictingLayer(self.frame, rows, turned) for turned in rotation.turned])
        self._real: Tensor | None = None
        self.read: Tensor | None = None  # [B], real tokens seen per row
        self.columns = 0

    # -------------------------------------------------------------- what it holds

    @property
    def states(self) -> list[EvictingLayer]:
        """The layers, as what they are."""
        return self.layers  # type: ignore[return-value]

    @property
    def length(self) -> int:
        """Entries S per row and layer, spare ones of shorter rows included."""
        return self.states[0].length

    @property
    def real(self) -> Tensor:
        """Which entries stand for a token, [B, S]."""
        self.sync()
        if self._real is None:
            raise ValueError("the cache is empty")
        return self._real

    @property
    def positions(self) -> Tensor:
        """The position of every entry, [B, S]; 0 for spare ones."""
        return (self.real.long().cumsum(1) - 1).clamp(min=0)

    def origins(self, layer: int) -> Tensor:
        """Which token of its row every entry of a layer was, counted from 0, [B, 1 or G, S]."""
        self.sync()
        origin = self.states[layer].origin
        if origin is None:
            raise ValueError("the cache is empty")
        return origin

    def nbytes(self) -> int:
        """Bytes of keys and values, allocated room included."""
        return sum(layer.nbytes() for layer in self.states)

    def check_budget(self, entries: int, rows: int) -> None:
        """Hold the cache to what was promised, by what is really there.

        Args:
            entries: Most entries per row and layer.
            rows: Most entries that memory may be allocated for.

        Raises:
            ValueError: When any layer holds more, or its buffers take more bytes than that.
        """
        for index, layer in enumerate(self.states):
            allowed = sum(b.shape[0] * b.shape[1] * rows * b.shape[3] * b.element_size() for b in layer.buffers)
            if layer.length > entries or layer.nbytes() > allowed:
                raise ValueError(
                    f"layer {index} holds {layer.length:,} entries in {layer.nbytes():,} bytes; "
                    f"promised were {entries:,} in {allowed:,}"
                )

    # -------------------------------------------------------------- for generate

    def inputs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """Arguments for `model.generate` or `model(...)` that go on behind the kept entries with ids [B, T]."""
        self.frame.absolute, self.frame.offset = False, 0
        rest = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        if self.length:
            rest = torch.cat([self.real.to(rest.dtype), rest], 1)
        return {"input_ids": input_ids, "attention_mask": rest, "past_key_values": self}

    def count_all(self) -> None:
        """From now on report how many positions were seen, not how many are held: `generate` gets all ids."""
        if self.length:
            self.sync()
        self.frame.absolute, self.frame.offset = True, self.columns - self.length

    def sync(self) -> None:
        """Take note of entries that somebody else appended: each is the next token of its row."""
        have = 0 if self._real is None else self._real.shape[1]
        layer = self.states[0]
        if layer.length > have:
            size = layer.keys.shape[0]
            self.extend(torch.ones(size, layer.length - have, dtype=torch.bool, device=layer.keys.device))
            self.columns += layer.length - have

    # -------------------------------------------------------------- for whoever reads text into it

    def expect(self, stored: Tensor | None, fresh: Tensor) -> None:
        """Say at which positions the entries [B, S] and the next states [B, T] stand, before a loosened pass."""
        if self.frame.loose:
            self.frame.fresh = self.rotation.angles(fresh)
            self.frame.stored = None if stored is None else self.rotation.angles(stored)

    def extend(self, real: Tensor) -> None:
        """Take note of states [B, T] that were appended: which of them are tokens."""
        self._real = real if self._real is None else torch.cat([self._real, real], 1)
        before = torch.zeros(len(real), dtype=torch.long, device=real.device) if self.read is None else self.read
        which = (before[:, None] + real.long().cumsum(1) - 1).clamp(min=0).int()
        self.read = before + real.sum(1)
        for layer in self.states:
            old = layer.origin
            if old is None:
                layer.origin = which[:, None]
            else:
                layer.origin = torch.cat([old, which[:, None].expand(-1, old.shape[1], -1)], 2)

    def forget(self, tokens: int) -> None:
        """Drop states that were appended last and of which no note was taken."""
        for layer in self.states:
            layer.crop(-tokens)

    def keep(self, indices: Sequence[Tensor], real: Tensor) -> None:
        """Drop everything but some entries.

        Args:
            indices: Per layer which entries stay, in rising order, [B, 1 or G, W].
            real: Which of the W stand for tokens, [B, W].
        """
        before, lost = self.positions, self.length - real.shape[1]
        after = (real.long().cumsum(1) - 1).clamp(min=0)
        for layer, index in zip(self.states, indices, strict=True):
            steps = None
            if not self.frame.loose:
                steps = self.rotation.angles(
                    after[:, None] - before[:, None].expand(-1, index.shape[1], -1).gather(2, index)
                )
            layer.select(index, steps)
        self._real = real
        if self.frame.absolute:
            self.frame.offset += lost

    @contextlib.contextmanager
    def loosened(self) -> Iterator[None]:
        """Store keys unrotated for the length of a block; use the cache only after `expect`.

        A block that fails may leave layers of different lengths, so the cache is then emptied.
        """
        self._settle(back=True)
        self.frame.loose = True
        try:
            yield
        except BaseException:
            self.reset()
            raise
        finally:
            self.frame.loose, self.frame.stored, self.frame.fresh = False, None, None
        self._settle(back=False)

    def trim(self, rows: int) -> None:
        """Give back memory beyond `rows` entries."""
        for layer in self.states:
            if layer.buffers and layer.buffers[0].shape[2] > rows:
                layer.reserve(max(rows, layer.length), exact=True)

    # -------------------------------------------------------------- transformers' own operations

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last entries of all rows; the number is not positive."""
        self.sync()
        super().crop(tokens_to_remove)
        if self._real is not None and tokens_to_remove:
            gone = self._real[:, self.length :]
            self._real = self._real[:, : self.length]
            self.columns -= gone.shape[1]
            if self.read is not None:
                self.read = self.read - gone.sum(1)
            for layer in self.states:
                layer.origin = None if layer.origin is None else layer.origin[:, :, : self.length]
                layer.scores = None if layer.scores is None else layer.scores[:, :, : self.length]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._real, self.read, self.columns = None, None, 0
        self.frame.offset, self.frame.absolute = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows of the batch (beam search)."""
        self._batch(super().reorder_cache, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows of the batch."""
        self._batch(super().batch_select_indices, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.length:
            rows = torch.arange(len(self.real), device=self.real.device).repeat_interleave(repeats)
            self._batch(super().batch_select_indices, rows)

    def _batch(self, act: Any, rows: Tensor) -> None:
        if not self.length:
            return
        self.sync()
        act(rows)
        at = rows.to(self.real.device)
        self._real = self.real[at]
        self.read = None if self.read is None else self.read[at]
        for layer in self.states:
            layer.origin = None if layer.origin is None else layer.origin[at]
            layer.scores = None if layer.scores is None else layer.scores[at]

    def _settle(self, back: bool) -> None:
        if self.length:
            angles = self.rotation.angles(self.positions)
            for layer in self.states:
                layer.settle(angles, back)


def adopt(cache: Any, rotation: Rotation, rows: int = 0) -> EvictingCache:
    """The cache to read into: an `EvictingCache` itself, or one that takes over the states of a plain `DynamicCache`.

    Raises:
        PlanError: For any other cache that holds something.
    """
    if isinstance(cache, EvictingCache):
        return cache
    own = EvictingCache(rotation, rows)
    if cache is None or not cache.get_seq_length():
        return own
    if any(type(layer) is not DynamicLayer for layer in cache.layers) or len(cache.layers) != len(own.layers):
        raise PlanError(
            f"entries of a {type(cache).__name__} cannot be evicted",
            hint="begin with an empty cache, or with a DynamicCache of full attention",
        )
    for mine, theirs in zip(own.states, cache.layers, strict=True):
        mine.lazy_initialization(theirs.keys, theirs.values)
        mine.append(theirs.keys, theirs.values)
    return own
