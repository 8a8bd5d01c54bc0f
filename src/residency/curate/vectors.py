"""What selectors over embeddings and qualities share: rows of length 1 in blocks, and checks that name the bad row.

Rows are read a block at a time as float32, so a float16 memory map of a million rows never stands in memory whole.
The cosine of two rows is the product of their unit rows; a zero row stays zero and is like nothing. The checks are
strict on purpose: an embedding that is not finite would be chosen or dropped for no reason anyone could read
(IEEE 754-2008: every comparison with NaN is false).

Cost: one pass; memory one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
BLOCK = 32_768
"""Rows per block: 48 MiB of float32 at a width of 384."""


def unit(rows: Any) -> Floats:
    """[N, D] rows scaled to length 1, float32; a zero row stays zero."""
    rows = np.asarray(rows, np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length == 0, 1, length)


def table(embeddings: Any, what: str = "embeddings") -> Any:
    """The embeddings themselves, if they are [N, D].

    Raises:
        ValueError: When they are not.
    """
    if getattr(embeddings, "ndim", 0) != 2:
        raise ValueError(f"{what} must be an array [N, D]; got {getattr(embeddings, 'shape', type(embeddings))}")
    return embeddings


def blocks(embeddings: Any, scaled: bool = True, block: int = BLOCK) -> Iterator[tuple[slice, Floats]]:
    """Float32 blocks of the rows with where they stand, of length 1 when `scaled`.

    Raises:
        ValueError: When a row is not finite; the message names the first.
    """
    for start in range(0, len(embeddings), block):
        part = np.asarray(embeddings[start : start + block], np.float32)
        with np.errstate(invalid="ignore"):
            total = part.sum(dtype=np.float64)
        if not np.isfinite(total):
            bad = np.flatnonzero(~np.isfinite(part).all(1))
            if len(bad):
                raise ValueError(f"row {start + int(bad[0]) + 1} has an embedding that is not finite")
        yield slice(start, start + len(part)), unit(part) if scaled else part


def whole(embeddings: Any, scaled: bool = True) -> Floats:
    """All rows as one float32 table (4·N·D bytes), checked, of length 1 when `scaled`."""
    result = np.empty(table(embeddings).shape, np.float32)
    for place, part in blocks(embeddings, scaled):
        result[place] = part
    return result


def qualities(quality: Any, rows: int) -> NDArray[np.float64]:
    """[N] float64; NaN where a row has none.

    Raises:
        ValueError: When there is not one per row, or one is infinite.
    """
    values = np.asarray(quality, np.float64)
    if values.shape != (rows,):
        raise ValueError(f"there are {rows:,} rows and qualities of shape {values.shape}: one number per row is needed")
    if np.isinf(values).any():
        raise ValueError(
            f"row {int(np.flatnonzero(np.isinf(values))[0]) + 1} has an infinite quality: write NaN for none"
        )
    return values
