"""Data references of a recipe: `embedded:NAME`, a path relative to the recipe, or an absolute path given on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residency import bases, embedded, rows
from residency.errors import DataError, RecipeError


@dataclass(frozen=True)
class Source:
    """One data source.

    Args:
        ref: As the recipe writes it.
        path: Its file or folder; None when embedded.
        fingerprint: Content address.
        limit: Read at most so many good rows.
        max_chars: Longer rows are refused.
        labelled: Whether rows to classify need a label.
    """

    ref: str
    path: Path | None
    fingerprint: str
    limit: int | None = None
    max_chars: int = 32_768
    labelled: bool = True

    @property
    def label(self) -> str:
        """What refusals call it."""
        return self.path.name if self.path else self.ref

    def stream(self) -> Iterator[rows.Row | rows.Refused]:
        """Its rows, good and refused, up to the limit of good ones."""
        raw: Any = self.path if self.path else embedded.data(self.ref.removeprefix("embedded:"))
        taken = 0
        for item in rows.stream(raw, max_chars=self.max_chars, name=self.label, labelled=self.labelled):
            yield item
            taken += isinstance(item, rows.Row)
            if self.limit is not None and taken >= self.limit:
                return

    def read(self) -> rows.Reading:
        """All its rows in memory.

        Raises:
            DataError: When none can be used.
        """
        reading = rows.Reading()
        for item in self.stream():
            (reading.rows if isinstance(item, rows.Row) else reading.refused).append(item)  # type: ignore[arg-type]
        if not reading.rows:
            raise rows.no_rows(str(self.path or self.ref), reading.refused)
        return reading

    def size(self) -> tuple[int, int]:
        """Rough (rows, characters per row) for estimates, without checking every row."""
        if self.path is None or self.path.is_dir() or self.path.suffix == ".parquet":
            lengths = [len(r.content) for r in self.stream() if isinstance(r, rows.Row)]
            return len(lengths), sum(lengths) // max(1, len(lengths))
        total, lines = self.path.stat().st_size, 0
        with self.path.open("rb") as handle:
            while block := handle.read(1 << 22):
                lines += block.count(b"\n")
        lines = max(1, lines)
        return min(lines, self.limit or lines), total // lines


def resolve(
    ref: str,
    beside: Path,
    *,
    where: str | None = None,
    limit: int | None = None,
    max_chars: int = 32_768,
    labelled: bool = True,
) -> Source:
    """Find a data source (see `Source` for the arguments; `beside` is the recipe's folder, `where` its place there).

    Raises:
        RecipeError: When a relative path leaves the recipe's folder, or embedded data has no such name.
        DataError: When there is no such file.
    """
    if ref.startswith("embedded:"):
        name = ref.removeprefix("embedded:")
        try:
            next(embedded.data(name))
        except RecipeError as error:
            raise RecipeError(error.what, where=where, hint=error.hint) from None
        return Source(ref, None, f"embedded:{embedded.data_version(name)}", limit, max_chars, labelled)
    path = Path(ref)
    if not path.is_absolute():
        inside = (beside / path).resolve()
        if not inside.is_relative_to(beside.resolve()):
            raise RecipeError(
                f"the path `{ref}` leaves the recipe's folder", where=where, hint="give an absolute path on purpose"
            )
        path = beside / path
    if not path.exists():
        raise DataError(f"there is no file `{path}`", where=where, hint="paths are relative to the recipe's folder")
    try:
        return Source(ref, path, bases.fingerprint_of(path), limit, max_chars, labelled)
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror}", where=where) from None
