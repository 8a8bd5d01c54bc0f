"""Lexical diversity: how many different words a text uses, by every measure in common use, for many texts at once.

With n tokens and U types (different tokens) of a text, f_v occurrences of type v, and natural logarithms:

    TTR = U / n              RTTR = U / √n              CTTR = U / √(2n)          Herdan = log U / log n
    Summer = log log U / log log n         Dugast = log²n / (log n − log U)       Maas = (log n − log U) / log²n
    MATTR   mean TTR of all windows of w tokens
    MTLD    n / (factors): a factor ends where the running TTR falls to ≤ 0.72, what is left at the end counts
            (1 − TTR) / (1 − 0.72); mean of reading forwards and backwards
    E(k)    = Σ_v 1 − C(n − f_v, k) / C(n, k)     types expected in k tokens drawn without replacement
    HD-D    = E(42) / 42
    vocd-D  the D for which  (D/k)(√(1 + 2k/D) − 1)  lies nearest, in least squares, to E(k)/k, k = 35 … 50
    distinct-k  different k-grams per token (or per k-gram)

All high = diverse, except Maas, where low is. TTR falls with length whatever the author does; MTLD, HD-D and vocd-D are
the ones that compare texts of different lengths.

Published vocd-D estimates E(k)/k from 100 random samples for each k and averages three fits. What the samples
estimate is the hypergeometric mean above (McCarthy & Jarvis 2007), so our choice is to fit that: no seed, no noise.
`samples: 100` brings the sampling back (seeded; every text starts from the seed, so its value depends on no other).

No set is ever built. One sort of (type, position) gives every token its previous occurrence, and "is this type new
since position s?" is `previous < s`. MTLD then walks all texts in step, one token of each at a time. E(k) is a running
product over k of the few different (text, frequency) pairs, exact to rounding, where log-gamma would lose six digits.

A value that does not exist is NaN: any measure of an empty text, Herdan, Dugast and Maas at n = 1, Summer at U = 1,
HD-D and vocd-D of a text with fewer tokens than are drawn. Dugast and vocd-D of a text that repeats no word are inf,
their limit. `lexicalrichness`, whose values these equal where it gives any (and whose way of splitting texts is the
default here: lower case, digits and dashes removed, punctuation to spaces), raises an exception instead.

Papers: Templin 1957 (TTR), Guiraud 1954 (RTTR), Carroll 1964 (CTTR), Herdan 1960, Summer 1966, Dugast 1978, Maas 1972,
Covington & McFall 2010 (MATTR), McCarthy & Jarvis 2010 (MTLD), McCarthy & Jarvis 2007 (HD-D), McKee, Malvern & Richards
2000 (vocd-D), Li et al. 2016 (1510.03055, distinct-k, per token). As data scores: survey 2408.02085, eq. 24-29.

Cost: T log T for T tokens, with splitting the texts the largest part; memory about 40 bytes per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from residency.curate.lexicaltokens import Tokens, grouped, words
from residency.curate.scoring import Array, Score

LANES = 64
"""Below so many unfinished texts, MTLD reads them one by one."""


class Lexical(Score):
    """What the measures share: texts → one column."""

    needs = ("tokens",)

    def of(self, tokens: Tokens) -> Array:
        """The measure of tokenised texts.

        Args:
            tokens: N texts.

        Returns:
            [N] values; NaN where there is none.
        """
        raise NotImplementedError("a measure of lexical diversity computes `of(tokens)`")

    def score(self, texts: Sequence[str] | Tokens) -> Array:
        """The measure of every text, [N]; several measures of the same texts share a `Tokens`."""
        return self.of(texts if isinstance(texts, Tokens) else Tokens.of(texts))

    def corpus(self, texts: Sequence[str]) -> float:
        """The measure of all texts read as one."""
        return float(self.of(Tokens.of(texts).joined())[0])


Form = Literal["ttr", "rttr", "cttr", "herdan", "summer", "dugast", "maas"]


class TypeToken(Lexical):
    """The type-token ratio and its corrections for length."""

    form: Form = "ttr"
    """Which function of the numbers of types and tokens."""

    @property
    def good(self) -> Literal["high", "low"]:  # type: ignore[override]
        """Maas falls with diversity, the others rise."""
        return "low" if self.form == "maas" else "high"

    def of(self, tokens: Tokens) -> Array:
        """See `Lexical.of`."""
        n, types = tokens.sizes.astype(float), tokens.types.astype(float)
        with np.errstate(all="ignore"):
            log_n, log_types = np.log(n), np.log(types)
            value = {
                "ttr": lambda: types / n,
                "rttr": lambda: types / np.sqrt(n),
                "cttr": lambda: types / np.sqrt(2 * n),
                "herdan": lambda: log_types / log_n,
                "summer": lambda: np.where(types > 1, np.log(log_types) / np.log(log_n), np.nan),
                "dugast": lambda: np.where(n > 1, log_n**2 / (log_n - log_types), np.nan),
                "maas": lambda: (log_n - log_types) / log_n**2,
            }[self.form]()
        return np.where(n > 0, value, np.nan)


class MATTR(Lexical):
    """Mean TTR over sliding windows."""

    window: int = Field(100, ge=1)
    """Tokens per window; a shorter text has no value."""

    def of(self, tokens: Tokens) -> Array:
        """See `Lexical.of`; linear in tokens: a token is the first of its type in so many windows."""
        w, begin, end = self.window, tokens.bounds[:-1], tokens.bounds[1:]
        place = np.arange(len(tokens.ids))
        first = np.maximum(np.maximum(tokens.previous, place - w) + 1, begin[tokens.texts])
        last = np.minimum(place, end[tokens.texts] - w)
        types = np.bincount(tokens.texts, np.maximum(last - first + 1, 0), len(tokens))
        windows = tokens.sizes - w + 1
        return np.where(windows > 0, types / np.maximum(windows, 1) / w, np.nan)


class MTLD(Lexical):
    """Mean length of the runs of words that stay above a type-token ratio."""

    threshold: float = Field(0.72, gt=0, lt=1)
    """The ratio at which a run ends; McCarthy & Jarvis recommend 0.66 to 0.75."""

    def of(self, tokens: Tokens) -> Array:
        """See `Lexical.of`."""
        # backwards, "previous" is the next occurrence, seen from the other end
        backwards = np.full(len(tokens.ids), -1, np.int64)
        later = np.flatnonzero(tokens.previous >= 0)
        backwards[tokens.previous[later]] = len(tokens.ids) - 1 - later
        ends = len(tokens.ids) - tokens.bounds[1:]
        forward = self._length(tokens.previous, tokens.bounds[:-1], tokens.sizes)
        return (forward + self._length(backwards[::-1], ends, tokens.sizes)) / 2

    def _length(self, previous: NDArray[np.int64], begin: NDArray[np.int64], sizes: NDArray[np.int64]) -> Array:
        """[N] mean run length in one direction; all texts advance by one token per step."""
        order = np.argsort(-sizes, kind="stable")
        sizes, place = sizes[order], begin[order].copy()
        start, types, factors = place.copy(), np.zeros(len(order), np.int64), np.zeros(len(order))
        at, active = 0, int((sizes > 0).sum())
        while active > LANES:
            here = place[:active] + at
            types[:active] += previous[here] < start[:active]
            over = np.flatnonzero(types[:active] / (here - start[:active] + 1) <= self.threshold)
            factors[over] += 1
            types[over] = 0
            start[over] = here[over] + 1
            at += 1
            while active and sizes[active - 1] <= at:
                active -= 1
        for i in range(active):
            begun, kinds, runs = int(start[i]), int(types[i]), 0
            low, high = int(place[i]) + at, int(place[i] + sizes[i])
            for now, before in enumerate(previous[low:high].tolist(), low):
                kinds += before < begun
                if kinds / (now - begun + 1) <= self.threshold:
                    runs, kinds, begun = runs + 1, 0, now + 1
            start[i], types[i], factors[i] = begun, kinds, factors[i] + runs
        left = place + sizes - start
        with np.errstate(all="ignore"):
            factors += np.where(left > 0, (1 - types / left) / (1 - self.threshold), 0)
            mean = np.where(sizes > 0, sizes / np.where(factors == 0, 1, factors), np.nan)
        result = np.empty(len(order))
        result[order] = mean
        return result


class HDD(Lexical):
    """Share of different words expected in a random draw from the text, exactly."""

    draws: int = Field(42, ge=1)
    """Tokens drawn without replacement; a shorter text has no value."""

    def of(self, tokens: Tokens) -> Array:
        """See `Lexical.of`."""
        return expected_ttr(tokens, (self.draws,))[:, 0]


class VocD(Lexical):
    """The parameter of the curve that TTR follows in samples of growing size."""

    smallest: int = Field(35, ge=2)
    """Tokens in the smallest sample."""
    largest: int = Field(50, ge=2)
    """Tokens in the largest sample; a shorter text has no value."""
    samples: int | None = Field(None, ge=1)
    """Random samples per size, as published (100); by default the mean over all samples there are, in closed form."""
    runs: int | None = Field(None, ge=1)
    """Fits averaged when sampling; by default three, as published."""
    seed: int | None = Field(None, ge=0)
    """Where sampling starts; by default 42."""

    @model_validator(mode="after")
    def _sizes_in_order(self) -> VocD:
        if self.largest < self.smallest:
            raise ValueError(f"largest ({self.largest}) is below smallest ({self.smallest})")
        if self.samples is None and (self.runs, self.seed) != (None, None):
            raise ValueError("runs and seed belong to sampling: give samples (100 as published), or neither")
        return self

    def of(self, tokens: Tokens) -> Array:
        """See `Lexical.of`."""
        k = np.arange(self.smallest, self.largest + 1)
        if self.samples is None:
            return fit_d(expected_ttr(tokens, k.tolist()), k)
        ratios = np.full((self.runs or 3, len(tokens), len(k)), np.nan)
        text, frequency, times = tokens.spectrum
        cuts = np.searchsorted(text, np.arange(len(tokens) + 1))
        for i in np.flatnonzero(tokens.sizes >= self.largest):
            part = slice(cuts[i], cuts[i + 1])
            kinds = np.repeat(frequency[part], times[part])
            rng = np.random.default_rng(42 if self.seed is None else self.seed)
            for run in range(len(ratios)):
                for j, size in enumerate(k.tolist()):
                    drawn = rng.multivariate_hypergeometric(kinds, size, self.samples, method="count")
                    ratios[run, i, j] = np.count_nonzero(drawn) / (self.samples * size)
        return np.mean([fit_d(each, k) for each in ratios], axis=0)


class Distinct(Lexical):
    """Different k-grams, relative to the length."""

    n: int = Field(1, ge=1)
    """Tokens per k-gram."""
    per: Literal["token", "ngram"] = "token"
    """Divide by the number of tokens (as published) or by the number of k-grams (1 means no repetition)."""

    def of(self, tokens: Tokens) -> Array:
        """See `Lexical.of`."""
        grams = self._grams(tokens)
        total = tokens.sizes if self.per == "token" else grams.sizes
        with np.errstate(all="ignore"):
            return np.where(grams.sizes > 0, grams.types / total, np.nan)

    def corpus(self, texts: Sequence[str]) -> float:
        """Of all texts; no k-gram reaches from one into the next."""
        tokens = Tokens.of(texts)
        grams = self._grams(tokens)
        total = len(tokens.ids) if self.per == "token" else len(grams.ids)
        return len(np.unique(grams.ids)) / total if len(grams.ids) else float("nan")

    def _grams(self, tokens: Tokens) -> Tokens:
        """The texts as k-grams."""
        ids, types, text = tokens.ids, tokens.vocabulary, tokens.texts
        for length in range(2, self.n + 1):
            pairs = ids[:-1] * tokens.vocabulary + tokens.ids[length - 1 :]
            # k-grams that reach over a text's end go last of all, so that until then places are positions of tokens
            kind, place = grouped(pairs)
            new = np.concatenate([[False], kind[1:] != kind[:-1]])[: len(kind)]
            ids = np.empty(len(kind), np.int64)
            ids[place] = np.cumsum(new)
            types, text = int(new.sum()) + 1, text[: len(ids)]
        sizes = np.maximum(tokens.sizes - self.n + 1, 0)
        keep = np.arange(len(ids)) - tokens.bounds[:-1][text] < sizes[text]
        return Tokens(ids[keep], np.concatenate([[0], np.cumsum(sizes)]), types)


def expected_ttr(tokens: Tokens, draws: Sequence[int]) -> Array:
    """Mean type-token ratio of all samples of k tokens without replacement.

    Args:
        tokens: N texts.
        draws: The sample sizes k, rising.

    Returns:
        [N, len(draws)]; NaN where a text has fewer than k tokens.
    """
    text, frequency, times = tokens.spectrum
    n = tokens.sizes[text].astype(float)
    missing, result, k = np.ones(len(text)), np.full((len(tokens), len(draws)), np.nan), 0
    for column, size in enumerate(draws):
        for done in range(k, size):  # C(n−f, k)/C(n, k), one draw at a time: the type is still missing
            missing *= np.maximum(n - frequency - done, 0) / np.maximum(n - done, 1)
        k = size
        types = np.bincount(text, times * (1 - missing), len(tokens))
        result[:, column] = np.where(tokens.sizes >= size, types / size, np.nan)
    return result


def fit_d(ratios: Array, sizes: NDArray[Any]) -> Array:
    """Least-squares D of the curve TTR(k) = (D/k)(√(1 + 2k/D) − 1).

    Args:
        ratios: [N, K] mean TTR at each sample size.
        sizes: [K] the sample sizes.

    Returns:
        [N] D; inf where every ratio is 1, NaN where one is missing.
    """
    with np.errstate(all="ignore"):
        # at one size the curve can be solved for D; Gauss-Newton on log D does the rest
        mean = ratios.mean(1)
        log_d = np.log(sizes.mean() * mean**2 / (2 * (1 - mean)))
        moving = np.isfinite(log_d)
        for _ in range(100):
            root = np.sqrt(1 + 2 * sizes / np.exp(log_d[moving])[:, None])
            curve = 2 / (1 + root)
            slope = curve * (root - 1) / (2 * root)
            step = ((ratios[moving] - curve) * slope).sum(1) / (slope**2).sum(1)
            log_d[moving] += np.clip(step, -2, 2)
            # a text stops by itself: its value must not depend on the others
            moving[moving] = np.abs(step) > 1e-13
            if not moving.any():
                break
        return np.where(np.isnan(ratios).any(1), np.nan, np.where((ratios >= 1).all(1), np.inf, np.exp(log_d)))


def profile(texts: Sequence[str], split: Callable[[str], list[str]] = words) -> dict[str, Array]:
    """Every measure at its defaults.

    Args:
        texts: N texts.
        split: Makes tokens of a text.

    Returns:
        Name → [N] values.
    """
    tokens = Tokens.of(texts, split)
    measures: dict[str, Lexical] = {form: TypeToken(form=form) for form in get_args(Form)}
    measures |= {"mattr": MATTR(), "mtld": MTLD(), "hdd": HDD(), "vocd": VocD()}
    measures |= {f"distinct-{n}": Distinct(n=n) for n in (1, 2, 3)}
    return {name: measure.of(tokens) for name, measure in measures.items()}
