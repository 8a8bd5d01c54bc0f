"""Texts as numbered words, and where each word stood before: what all measures of lexical diversity are counted from.

No set is ever built: one sort of (word, position) gives every token its previous occurrence in its text, and a token is
the first of its kind since position s just where `previous < s`.

Our choice throughout; `words` splits as the package lexicalrichness 0.5.1 does, so that values can be compared.

Cost: T log T for T tokens, splitting the texts being the largest part; about 40 bytes per token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain, count
from string import digits, punctuation
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 14
"""Tokens sorted at a time: few enough for the processor's cache, which makes it three times faster than all at once."""
CHUNK = 64
"""Texts split at a time."""
_SPACES = bytes.maketrans(punctuation.encode(), b" " * len(punctuation))
_REMOVED = (digits + "-").encode()


def words(text: str) -> list[str]:
    """Split a text as `lexicalrichness` does: lower case, no digits, no dashes, punctuation separates.

    Args:
        text: Any text.

    Returns:
        Its tokens, in order.
    """
    text = text.lower().replace("–", "").replace("—", "")
    # UTF-8 of anything that is not ASCII has no ASCII byte, so bytes can be mapped without looking at characters
    kept = text.encode("utf-8", "surrogatepass").translate(_SPACES, _REMOVED)
    return kept.decode("utf-8", "surrogatepass").split()


class Tokens:
    """Many texts as token ids, with what the measures share computed once.

    Args:
        ids: [T] the texts' tokens, one text after the other; equal tokens have equal ids ≥ 0.
        bounds: [N+1] text i is `ids[bounds[i]:bounds[i+1]]`.
        types: Ids lie below this; by default the largest id + 1.
    """

    def __init__(self, ids: NDArray[Any], bounds: NDArray[Any], types: int | None = None) -> None:
        self.ids, self.bounds = np.asarray(ids, np.int64), np.asarray(bounds, np.int64)
        if len(self.bounds) < 1 or self.bounds[0] != 0 or self.bounds[-1] != len(self.ids):
            raise ValueError(f"bounds must run from 0 to the {len(self.ids)} ids given")
        if (np.diff(self.bounds) < 0).any() or (len(self.ids) and self.ids.min() < 0):
            raise ValueError("bounds must not fall and ids must not be negative")
        self.vocabulary = types if types is not None else int(self.ids.max(initial=-1)) + 1

    @classmethod
    def of(cls, texts: Sequence[Any], split: Callable[[str], list[str]] = words) -> Tokens:
        """Number the tokens of texts.

        Args:
            texts: N texts, or N sequences of tokens (strings or numbers), which are taken as they are.
            split: Makes tokens of a text.

        Returns:
            The texts as ids.

        Raises:
            ValueError: When a single text was given instead of a sequence of texts.
        """
        if isinstance(texts, str):
            raise ValueError("a sequence of texts is needed, and this is one text: write [text]")
        known: defaultdict[Any, int] = defaultdict(count().__next__)
        cut = known["\0"]
        sizes, parts = [np.zeros(1, np.int64)], [np.empty(0, np.int64)]
        for start in range(0, len(texts), CHUNK):
            part = texts[start : start + CHUNK]
            joined = "\n\0\n".join(part) if split is words and all(isinstance(t, str) for t in part) else ""
            if joined and joined.count("\0") == len(part) - 1:
                # many texts in one go: a word that no text contains stands between them
                flat = split(joined)
                ids = np.fromiter(map(known.__getitem__, flat), np.int64, len(flat))
                ends = np.flatnonzero(ids == cut)
                sizes.append(np.diff(ends, prepend=-1, append=len(ids)) - 1)
                parts.append(np.delete(ids, ends))
                continue
            lists = [split(text) if isinstance(text, str) else text for text in part]
            sizes.append(np.array([len(each) for each in lists]))
            flat = list(chain.from_iterable(lists))
            parts.append(np.fromiter(map(known.__getitem__, flat), np.int64, len(flat)))
        return cls(np.concatenate(parts), np.cumsum(np.concatenate(sizes)), len(known))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def joined(self) -> Tokens:
        """All texts as one, in their order: its measures are the corpus's."""
        return Tokens(self.ids, np.array([0, len(self.ids)]), self.vocabulary)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """[N] tokens per text."""
        return np.diff(self.bounds)

    @cached_property
    def texts(self) -> NDArray[np.int32]:
        """[T] which text each token is of."""
        return np.repeat(np.arange(len(self), dtype=np.int32), self.sizes)

    @cached_property
    def previous(self) -> NDArray[np.int64]:
        """[T] where the same token stood last in the same text; −1 where it had not."""
        previous = np.full(len(self.ids), -1, np.int64)
        for low, high in self._blocks():
            kind, place = grouped(self.ids[low:high])
            place += low
            same = (kind[1:] == kind[:-1]) & (self.texts[place[1:]] == self.texts[place[:-1]])
            previous[place[1:][same]] = place[:-1][same]
        return previous

    @cached_property
    def types(self) -> NDArray[np.int64]:
        """[N] different tokens per text."""
        return np.bincount(self.texts[self.previous < 0], minlength=len(self))

    @cached_property
    def spectrum(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Which text, which frequency, and how many types of that text occur so often: three arrays of one length."""
        found: list[NDArray[np.int64]] = []
        for low, high in self._blocks():
            text = self.texts[low:high].astype(np.int64)
            keys = (text - text[0]) * self.vocabulary + self.ids[low:high]
            keys.sort()
            starts, times = _runs(keys)
            found.append(_sorted((keys[starts] // self.vocabulary + text[0]) * (self.sizes.max() + 1) + times))
        pairs = np.concatenate([np.empty(0, np.int64), *found])
        starts, times = _runs(pairs)
        text, frequency = np.divmod(pairs[starts], self.sizes.max(initial=0) + 1)
        return text, frequency, times

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of tokens that end where texts end, of about `BLOCK` tokens."""
        low = 0
        while low < len(self.ids):
            high = int(self.bounds[np.searchsorted(self.bounds, low + BLOCK, "right") - 1])
            if high <= low:
                high = int(self.bounds[np.searchsorted(self.bounds, low, "right")])
            yield low, high
            low = high


def grouped(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Values ≥ 0 in rising order, and their places, which rise where values are equal."""
    bits = len(values).bit_length()
    if int(values.max(initial=0)) >> (63 - bits):
        places = np.argsort(values, kind="stable")
        return values[places], places
    # value and place in one number: sorting numbers is several times faster than sorting an index
    keys = values << bits | np.arange(len(values))
    keys.sort()
    return keys >> bits, keys & ((1 << bits) - 1)


def _runs(ordered: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where runs of equal values start, and how long they are."""
    if not len(ordered):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1])
    return starts, np.diff(np.append(starts, len(ordered)))


def _sorted(values: NDArray[np.int64]) -> NDArray[np.int64]:
    values.sort()
    return values
