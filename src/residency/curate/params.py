"""Keys of `curate` that do not depend on how rows are chosen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from keyword import iskeyword
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from residency.catalog import METHODS, nearest
from residency.curate.budget import Budget
from residency.curate.expressions import FUNCTIONS, Formula
from residency.curate.measuring import Wanted
from residency.curate.scoring import Score
from residency.errors import ResidencyError
from residency.step import Params

SCORES = tuple(m.name for m in METHODS if m.stage == "curate" and m.role == "Scorer")
FACTS = ("tag", "label", "line")
"""Columns every pool has without a score."""
RESERVED = frozenset({"id", "chosen", "reason", *FUNCTIONS})
"""Names that formulas or the table of scores use otherwise."""


def _checked(scores: Any) -> Any:
    """Every score exists, its keys are its own, and no two columns have one name."""
    seen: set[str] = set()
    for column, name, keys in _entries(scores):
        if name not in SCORES:
            guess = nearest(name, SCORES)
            raise ValueError(
                f"no score is called `{name}`"
                + (f"; did you mean `{guess}`?" if guess else "")
                + " `residency methods` lists them"
            )
        if not re.fullmatch(r"[A-Za-z][\w-]*", column) or iskeyword(column) or column in RESERVED:
            raise ValueError(f"`as: {column}` is no name for a column: letters, digits and hyphens, and no word in use")
        if column.replace("-", "_") in {each.replace("-", "_") for each in (*seen, *FACTS)}:
            raise ValueError(f"two columns are called `{column}`: give one a name, {{{name}: {{as: {name}-2}}}}")
        seen.add(column)
        try:
            Wanted(column, name, keys).score()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            said = "no such key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
            raise ValueError(f"`{name}`: {f'`{key}`: ' if key else ''}{said}") from None
        except ResidencyError as error:
            raise ValueError(f"`{name}`: {error.what}" + (f"; {error.hint}" if error.hint else "")) from None
    return scores


def _entries(scores: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(column, score, its keys) of every entry."""
    for entry in scores:
        if isinstance(entry, str):
            yield entry, entry, {}
        elif isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())), dict):
            name, keys = next(iter(entry.items()))
            yield str(keys.get("as", name)), name, {k: v for k, v in keys.items() if k != "as"}
        else:
            raise ValueError(f"a score is a name, or {{name: {{key: value}}}}, and this is {entry!r}")


class Curating(Params):
    """Keys of every `curate` step."""

    pool: str | None = None
    """The rows to choose from: a file, a `datasets` folder, or `embedded:NAME`; by default the rows at hand."""
    scores: Annotated[tuple[str | dict[str, Any], ...], AfterValidator(_checked)] = ()
    """Columns to compute: names from `residency methods`, or {NAME: {its keys, as: column}}."""
    filter: str | None = None
    """A condition on the columns (and tag, label, line): rows that do not meet it are dropped before the choice."""
    quality: str | None = None
    """What the choice ranks rows by: a formula over the columns, high is good; by default the only score."""
    encoder: str = "all-minilm-l6-v2"
    """Sentence encoder: an embedded base, a local folder, or a hub id (mean pooling)."""
    reader: str | None = None
    """The language model that scores by a model ask; by default the model at this point of the recipe."""
    judge: str | None = None
    """The language model that rates rows for the score `judge`; by default the reader."""
    reward: str | None = None
    """A reward model (a sequence classifier with one logit) for the score `reward`."""
    batch: int = Field(64, ge=1)
    """Texts per forward pass of the encoder."""
    scale: Literal["here", "ray"] = "here"
    """Where rows are measured: in this process, or by Ray Data on the cluster of RAY_ADDRESS (else on this machine)."""
    workers: int = Field(2, ge=1)
    """Processes that measure at once with `scale: ray`; each holds the models."""

    @model_validator(mode="after")
    def _formulas_read(self) -> Curating:
        names = self.columns
        # one row of each column's kind shows whether texts and numbers are where they may be
        row = {name: np.array([""], object) if name in FACTS[:2] else np.ones(1) for name in names}
        for key, text in (("filter", self.filter), ("quality", self.quality)):
            if text is None:
                continue
            kind = Formula(text, names)(row).dtype.kind
            if key == "filter" and kind != "b":
                raise ValueError(f"`filter: {text}` is a value, not a condition; compare it: {text} > 1")
            if key == "quality" and kind != "f":
                raise ValueError(f"`quality: {text}` is no number; a formula over the scores, high is good")
        if self.scale == "here" and "workers" in self.model_fields_set:
            raise ValueError("workers belongs to scale: ray; in this process one measures")
        return self

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """The columns to compute."""
        return tuple(Wanted(*entry) for entry in _entries(self.scores))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names formulas may use."""
        return (*(w.column for w in self.wanted), *FACTS)

    @property
    def loaded(self) -> list[tuple[str, Score]]:
        """Column and score of every entry."""
        return [(w.column, w.score()) for w in self.wanted]


class CuratingSome(Curating):
    """Keys of `curate` steps that keep a stated amount."""

    keep: Budget = 1000
    """How much: rows (400), a share of what passes the filter (20%), or tokens as trained on (50000 tokens)."""
