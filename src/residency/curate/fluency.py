"""How likely a model finds an answer, and how much the question helps: perplexity and instruction-following difficulty.

    perplexity  exp(mean nll of the answer given its question)
    IFD         mean nll(answer | question) / mean nll(answer alone),    or the ratio of the two perplexities

IFD above 1 says that the question makes its answer less likely: a mismatched pair, which the paper drops. Among the
rest high is kept: the question is not enough for this model yet. Perplexity has two bad ends: lowest is boilerplate,
highest noise; for pretraining, middle and high percentiles are what is kept (survey 2408.02085).

IFD is defined as the ratio of the mean losses s(A|Q) / s(A) by Li et al. 2023 ("From Quantity to Quality", arXiv
2308.12032, NAACL 2024) and computed so in its code (tianyi-lab/Cherry_LLM at 01fac8d, which drops ratios above 1);
the authors' Superfiltering (arXiv 2402.00530, ACL 2024; code at f0764af) takes the ratio of perplexities. Both are
above 1 for the same rows, but rank the others differently: a ratio of losses forgives a difference between unlikely
answers. Superfiltering itself is this score with a small proxy model: it ranks rows much like a large one.

`reading` says what "alone" is. Perplexity as a data score: Marion et al. 2023 (arXiv 2309.04564), no code released.
Cost: none beyond the reading: one pass for perplexity, a second, shorter one for IFD.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from residency.curate.reading import Alone, Answer, Pass, Read, Reading
from residency.curate.scoring import Array


class Perplexity(Read):
    """Of the answer, given the question."""

    good = "middle"

    def score(self, reading: Reading) -> Array:
        """exp(mean nll), [N], at least 1."""
        return _exp(reading.of(Answer(), "nll"))


class IFD(Read):
    """How little the question helps to predict the answer; above 1 it harms."""

    form: Literal["loss", "perplexity"] = "loss"
    """Whether mean losses (the paper and its code) or perplexities (Superfiltering) are divided."""

    def passes(self) -> tuple[Pass, ...]:
        """See `Read.passes`."""
        return Answer(), Alone()

    def score(self, reading: Reading) -> Array:
        """The ratio, [N]; NaN where the answer alone is certain."""
        given, alone = reading.of(Answer(), "nll"), reading.of(Alone(), "nll")
        if self.form == "perplexity":
            return _exp(given - alone)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(alone > 0, given / alone, np.nan)


class AnswerTokens(Read):
    """How many tokens of the model the answer has, its end of turn included: what training on the row costs."""

    good = "middle"

    def passes(self) -> tuple[Pass, ...]:
        """None: they are counted on the way."""
        return ()

    def score(self, reading: Reading) -> Array:
        """[N]; NaN where there is no answer. Of a row that was cut, the tokens that are left."""
        return np.where(reading.tokens > 0, reading.tokens, np.nan)


def _exp(values: Array) -> Array:
    """Exp without inf: the largest float instead."""
    with np.errstate(over="ignore"):
        return np.minimum(np.exp(values), np.finfo(float).max)
