"""Scores made of other scores: DEITA's product, InstructionMining's linear rule, MoDS' necessity.

    deita-score          complexity × quality
    instruction-mining   b_0 + Σ_j b_j x_j  ≈  log of the loss that training on such rows leads to        low is good
    necessity            −r(question, the model's own answer),  or  r(question, given answer) − that      high is good

DEITA ranks rows by the product of two judges' numbers (`judge` with both aspects), then takes them one by one unless
too near to one taken. InstructionMining trains on many subsets, regresses the log of each one's loss on a trusted set
on the subset's mean indicators (length, reward, perplexity, MTLD, kNN distance, …) and applies the fitted rule to
rows. Its coefficients belong to its models, its indicators and their units; none are built in: give `weights`, or let
`LinearRule.fit` find them from subsets of yours. MoDS keeps rows whose question the model, briefly tuned, still
answers badly in the eyes of a reward model; with `given`, what counts is how much better the given answer is (our
choice).

Papers: Liu et al., "What Makes Good Data for Alignment?", ICLR 2024, arXiv 2312.15685 (code hkust-nlp/deita at
b279f2c); Cao et al., "Instruction Mining: When Data Mining Meets Large Language Model Finetuning", arXiv 2307.06290,
2023, no code found; Du, Zong, Zhang, "MoDS", arXiv 2311.15653, 2023 (its code was not consulted). Cost: none beyond
the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from residency.curate.scoring import Array, Score


class Combined(Score):
    """A score of columns."""

    needs = ("columns",)

    @staticmethod
    def column(columns: Mapping[str, Array], name: str) -> Array:
        """A column by name.

        Raises:
            ValueError: When there is none.
        """
        if name not in columns:
            raise ValueError(f"there is no column `{name}` to combine; columns: {', '.join(columns) or 'none'}")
        return np.asarray(columns[name], np.float64)


class DeitaScore(Combined):
    """Complexity × quality."""

    complexity: str = "complexity"
    """Column of the complexity of questions."""
    quality: str = "quality"
    """Column of the quality of answers."""

    def score(self, columns: Mapping[str, Array]) -> Array:
        """The product, [N]; NaN where either is missing."""
        return self.column(columns, self.complexity) * self.column(columns, self.quality)


class LinearRule(Combined):
    """A linear rule over columns that predicts the log of a loss."""

    good = "low"

    weights: dict[str, float] = Field(default_factory=dict)
    """Column → its coefficient; see `LinearRule.fit`."""
    intercept: float = 0.0
    """What is added to every row."""

    def score(self, columns: Mapping[str, Array]) -> Array:
        """The predicted log loss, [N]; NaN where a column with a coefficient is missing.

        Raises:
            ValueError: When no weights are given, or a column is missing.
        """
        if not self.weights:
            raise ValueError(
                "the linear rule has no weights, and the paper's hold for its models only: "
                "give `weights`, or fit them with LinearRule.fit on subsets whose loss you know"
            )
        return self.intercept + sum(
            (weight * self.column(columns, name) for name, weight in self.weights.items()), np.zeros(())
        )

    @classmethod
    def fit(cls, columns: Mapping[str, Array], losses: Sequence[float]) -> LinearRule:
        """Least squares of log loss on columns.

        Args:
            columns: Of n subsets (or rows) the mean indicators, [n] each.
            losses: n positive losses after training on them.

        Returns:
            The rule.

        Raises:
            ValueError: When losses are not positive, a value is missing, or n is too small or indicators are
                linearly dependent, so that coefficients are not determined.
        """
        design = np.column_stack([np.ones(len(losses)), *(np.asarray(c, float) for c in columns.values())])
        y = np.asarray(losses, float)
        if not (y > 0).all() or not np.isfinite(design).all() or not np.isfinite(y).all():
            raise ValueError("losses must be positive and every indicator a finite number")
        scale = np.abs(design).max(0)
        scale[scale == 0] = 1
        found, _, rank, _ = np.linalg.lstsq(design / scale, np.log(y), rcond=None)
        if rank < design.shape[1]:
            raise ValueError(
                f"{len(y)} losses do not determine {design.shape[1]} coefficients: more subsets, fewer columns"
            )
        first, *others = (found / scale).tolist()
        return cls(weights=dict(zip(columns, others, strict=True)), intercept=first)


class Necessity(Combined):
    """How badly the model answers by itself."""

    own: str = "own-reward"
    """Column with the reward of the model's own answer to the question."""
    given: str | None = None
    """Column with the reward of the row's answer, which is then compared with; none compares with nothing."""

    def score(self, columns: Mapping[str, Array]) -> Array:
        """High where the row is needed, [N]; NaN where a reward is missing. MoDS keeps values above 0."""
        own = self.column(columns, self.own)
        return -own if self.given is None else self.column(columns, self.given) - own
