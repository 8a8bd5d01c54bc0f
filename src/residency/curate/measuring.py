"""Scores, embeddings and gradients of rows, a chunk at a time: what one worker does, here or on another machine.

`Work` says in plain values what is wanted and where the models lie; `Measurer` loads them once and measures chunk after
chunk. Every input a score needs is made once per chunk and shared (`Supply`), so ten scores over what a language model
says of a row cost one pass of that model. A row's figures depend on its chunk of `pool.CHUNK` rows at most, and chunks
are the same wherever they are measured: one process, several machines, or a second try after a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from residency.catalog import load, method
from residency.curate.scoring import Score

if TYPE_CHECKING:
    from residency.rows import Row

EMBEDDINGS, GRADIENTS, TOKENS = "#embeddings", "#gradients", "#tokens"
"""Names of what a measured chunk holds besides the columns of scores."""


@dataclass(frozen=True)
class Wanted:
    """One column: its name, the catalogue's name of the score, and the score's keys as the recipe spells them."""

    column: str
    method: str
    params: dict[str, Any] = field(default_factory=dict)

    def score(self) -> Score:
        """The score with its keys."""
        row = method(self.method)
        found = load(row.object, row.extras).model_validate(self.params)
        assert isinstance(found, Score)
        return found


class Supply(dict[str, Any]):
    """Inputs by name, each made when it is first asked for.

    Args:
        makers: Name → makes the input.
    """

    def __init__(self, makers: dict[str, Callable[[], Any]]) -> None:
        super().__init__()
        self._makers = makers

    def __missing__(self, name: str) -> Any:
        self[name] = value = self._makers[name]()
        return value

    def has(self, name: str) -> bool:
        """Whether an input is there or can be made."""
        return name in self or name in self._makers

    def only(self, rows: np.ndarray, size: int) -> Supply:
        """The same inputs of some of the `size` rows; what belongs to trusted rows stays whole."""

        def part(name: str) -> Any:
            values = self[name]
            if len(rows) == size or name.startswith("example_"):
                return values
            if name == "columns":
                return {column: each[rows] for column, each in values.items()}
            return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]

        return Supply({name: partial(part, name) for name in self._makers})

    def of(self, needs: Iterable[str]) -> list[Any]:
        """The inputs of a score or a selector, in order; a name that ends in "?" may have no maker."""
        return [
            None if name.endswith("?") and not self.has(name[:-1]) else self[name.removesuffix("?")] for name in needs
        ]


def texts_of(rows: Sequence[Row]) -> dict[str, Callable[[], Any]]:
    """Makers of the inputs that come from the rows themselves."""

    def tokens() -> Any:
        from residency.curate.lexical import Tokens

        return Tokens.of([r.content for r in rows])

    return {
        "texts": lambda: [r.content for r in rows],
        "questions": lambda: [r.prompt for r in rows],
        "answers": lambda: [r.answer for r in rows],
        "labels": lambda: [r.label for r in rows],
        "tags": lambda: [tags_of(r.tag) for r in rows],
        "tokens": tokens,
    }


def tags_of(tag: str | None) -> tuple[str, ...]:
    """The tags of a row: what its source attached, parted at commas."""
    return tuple(t for t in (part.strip() for part in (tag or "").split(",")) if t)


@dataclass(frozen=True)
class Work:
    """What to measure, and with what.

    Args:
        scores: The columns.
        extras: Of `EMBEDDINGS`, `GRADIENTS`, `TOKENS`, what else to return.
        examples: JSONL of the trusted rows.
        encoder: Folder of a sentence encoder.
        reader: Folder of the language model that reads rows.
        batch: Rows per forward pass.
        device: "cpu", "cuda" or "mps".
        seed: Seed of everything random.
    """

    scores: tuple[Wanted, ...]
    extras: tuple[str, ...]
    examples: Path
    encoder: Path | None
    reader: Path
    batch: int
    device: str
    seed: int


class Measurer:
    """Measures chunks; its models are loaded when first needed, and once."""

    TRUSTED = ("example_texts", "example_labels", "example_embeddings")

    def __init__(self, work: Work) -> None:
        self.work = work
        self._scores = [(wanted.column, wanted.score()) for wanted in work.scores]
        self._kept = Supply(
            {
                "encoder": self._load_encoder,
                "examples": self._load_examples,
                "tokenizer": self._load_tokenizer,
                "example_texts": lambda: [r.content for r in self._kept["examples"]],
                "example_labels": lambda: [r.label for r in self._kept["examples"]],
                "example_embeddings": lambda: self.embed(self._kept["examples"]),
            }
        )

    def __call__(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """The columns [n] of a chunk, and its extras [n, …]."""
        supply = self.supply(rows)
        found = {column: np.asarray(score.score(*supply.of(score.needs)), float) for column, score in self._scores}
        if EMBEDDINGS in self.work.extras:
            found[EMBEDDINGS] = supply["embeddings"]
        if TOKENS in self.work.extras:
            ids = self._kept["tokenizer"]([r.content for r in rows], add_special_tokens=False)["input_ids"]
            found[TOKENS] = np.array([len(i) for i in ids], float)
        return found

    def supply(self, rows: Sequence[Row]) -> Supply:
        """The inputs of scores over these rows."""
        trusted = {name: partial(self.trusted, name) for name in self.TRUSTED}
        return Supply({**texts_of(rows), **trusted, "embeddings": lambda: self.embed(rows).astype(np.float16)})

    def trusted(self, name: str) -> Any:
        """An input of the trusted rows, one of `TRUSTED`."""
        return self._kept[name]

    def embed(self, rows: Sequence[Row]) -> np.ndarray:
        """[n, D] of rows as texts."""
        return self._kept["encoder"].encode([r.content for r in rows], batch=self.work.batch)

    def _load_encoder(self) -> Any:
        from residency import encoders

        assert self.work.encoder is not None
        return encoders.load(self.work.encoder, self.work.device)

    def _load_examples(self) -> list[Row]:
        from residency.rows import load

        return load(self.work.examples)

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.work.reader)
