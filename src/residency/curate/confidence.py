"""How sure a model is of an answer, token by token: entropy, least confidence, margins, the length of the error.

With p_t the distribution at answer token t, over T tokens:

    token-entropy      mean_t −Σ_v p_t(v) log p_t(v)                  in nats, at most log V
    least-confidence   mean_t (1 − max p_t),                         or 1 − Π_t max p_t for the whole
    margin             mean_t of the largest minus the second largest p_t,     or the least of them
    EL2N               mean_t ‖p_t − onehot(a_t)‖₂                   between 0 and √2

The first three ask what the model expects, whatever the answer says; EL2N asks whether it is right. High entropy, low
margin, low confidence and high EL2N are what active learning would label next. They also are what noise looks like;
survey 2408.02085 (eq. 17-20) notes that these scores can lose to random choice, so measure before you trust one.

The survey prints the entropy without the sum over words and with the wrong sign; the sum over all words is used here.
Least confidence of the whole is 1 − Π, which rounds to 1 for answers of more than some dozens of tokens.

Papers: Settles, Active Learning Literature Survey, 2009 (entropy, least confidence, margin; Lewis & Gale 1994;
Scheffer et al. 2001); Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021 (arXiv 2107.07075; EL2N,
there averaged over several early models; here one model and the mean over tokens, as in Marion et al. 2023, arXiv
2309.04564). No official code for language models. Cost: none beyond the reading's first pass.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from residency.curate.reading import Answer, Read, Reading
from residency.curate.scoring import Array


class TokenEntropy(Read):
    """Mean entropy of the model's expectation at the answer's tokens."""

    def score(self, reading: Reading) -> Array:
        """Nats, [N]."""
        return reading.of(Answer(), "entropy")


class LeastConfidence(Read):
    """How much probability is left for all but the likeliest token."""

    form: Literal["mean", "whole"] = "mean"
    """Mean over tokens of 1 − max p, or 1 − the product of all max p."""

    def score(self, reading: Reading) -> Array:
        """Between 0 and 1, [N]."""
        if self.form == "mean":
            return 1 - reading.of(Answer(), "best")
        return -np.expm1(reading.of(Answer(), "log_best") * reading.tokens)


class Margin(Read):
    """How far the likeliest token leads the second."""

    good = "low"

    form: Literal["mean", "least"] = "mean"
    """Over the answer's tokens."""

    def score(self, reading: Reading) -> Array:
        """Between 0 and 1, [N]."""
        return reading.of(Answer(), "margin" if self.form == "mean" else "least_margin")


class EL2N(Read):
    """Length of the error vector p − onehot, mean over the answer's tokens."""

    def score(self, reading: Reading) -> Array:
        """Between 0 and √2, [N]."""
        return reading.of(Answer(), "el2n")
