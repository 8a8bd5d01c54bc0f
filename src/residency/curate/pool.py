"""The rows to choose from: their texts in chunk files on disk, what figures and formulas need of them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from residency.rows import Row

CHUNK = 2048
"""Rows per chunk: the unit of work of a worker, and of what a killed step does not compute again."""
EXCERPT = 160
"""Characters of a question that stay in memory."""


@dataclass
class Pool:
    """N candidate rows.

    Args:
        files: One JSONL per `CHUNK` rows.
        ids, lines, tags, labels, questions: Of every row; the questions are excerpts.
    """

    files: list[Path] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    tags: list[str | None] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)

    @classmethod
    def gather(cls, rows: Iterable[Row], folder: Path) -> Pool:
        """Write rows to chunk files below a folder, as they come."""
        from residency.rows import write

        folder.mkdir(exist_ok=True)
        pool = cls()
        chunk: list[Row] = []

        def flush() -> None:
            file = folder / f"{len(pool.files):06d}.jsonl"
            write(file, chunk)
            pool.files.append(file)
            chunk.clear()

        for row in rows:
            chunk.append(row)
            pool.ids.append(row.id)
            pool.lines.append(row.line)
            pool.tags.append(row.tag)
            pool.labels.append(row.label)
            pool.questions.append(row.prompt[:EXCERPT])
            if len(chunk) == CHUNK:
                flush()
        if chunk:
            flush()
        return pool

    def __len__(self) -> int:
        return len(self.ids)

    def facts(self) -> dict[str, np.ndarray]:
        """Columns for formulas: tag and label ("" where there is none), and line."""
        texts = {"tag": self.tags, "label": self.labels}
        return {name: np.array([value or "" for value in values], object) for name, values in texts.items()} | {
            "line": np.array(self.lines, float)
        }

    def chunks(self) -> Iterator[list[Row]]:
        """The rows, a chunk at a time."""
        from residency.rows import load

        for file in self.files:
            yield load(file)

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Some rows, in the order given; only their chunks are read."""
        from residency.rows import load

        found: dict[int, Row] = {}
        for number in sorted({i // CHUNK for i in indices}):
            rows = load(self.files[number])
            found |= {i: rows[i % CHUNK] for i in indices if i // CHUNK == number}
        return [found[i] for i in indices]
