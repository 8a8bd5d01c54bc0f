"""How hard an answer is for the model: for its subnets, from memory, and when the question loses words.

    learning-complexity   mean over subnets of the answer's nll,    or 1 − mean of 1 / PPL         high = hard
    memorisation          share of the answer's first tokens that the model writes greedily        high = known by heart
    prompt-uncertainty    mean |p(a_t | q, a_<t) − p(a_t | q with words missing, a_<t)|            high = uncertain

**Learning complexity**: easy rows are learned by models of small capacity too. The survey's text says that small is
easy, yet its eq. 11 averages perplexities or confidences without saying which; here high is hard in both forms. The
paper prefers easy rows where few are kept and harder ones where many are.

**Memorisation**: by default teacher-forced, which costs nothing: is a_t the argmax given the true a_<t? With
`exact` the model really generates. The two agree up to the first miss; then the generated text goes its own way, and
what it shares with the answer is usually chance. Over the first 32 tokens, as the literature does, or all of them.

**Prompt uncertainty**: rows whose answer depends on the exact wording are informative ("ambiguous"). It does not say
that the answer is good.

Papers: Jiang et al., "Exploring Learning Complexity for Efficient Downstream Dataset Pruning", 2024, arXiv
2402.05356; Biderman et al., "Emergent and Predictable Memorization in Large Language Models", 2023, arXiv 2304.11158
(as a data score: Marion et al., arXiv 2309.04564); Kung et al., "Active Instruction Tuning",
EMNLP 2023, arXiv 2311.00288. `probes` says what the passes do and cost, what is the papers' and what is ours.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from residency.curate.probes import Greedy, Perturbed, Subnets
from residency.curate.reading import WINDOW, Answer, Pass, Read, Reading
from residency.curate.scoring import Array


class LearningComplexity(Read):
    """How badly weakened copies of the model predict the answer."""

    good = "low"

    rates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((0.1, 0.2, 0.3, 0.4, 0.5), min_length=1)
    """Shares of the inputs of every linear layer that a subnet loses, one subnet each."""
    form: Literal["loss", "confidence"] = "loss"
    """Mean nll, or 1 − the mean of 1 / perplexity, which weighs the strong subnets more."""
    seed: int = Field(0, ge=0)
    """Of the subnets."""

    def passes(self) -> tuple[Pass, ...]:
        """See `Read.passes`."""
        return (Subnets(self.rates, self.seed),)

    def score(self, reading: Reading) -> Array:
        """[N], high = hard."""
        found = self.passes()[0]
        return reading.of(found, "nll") if self.form == "loss" else 1 - reading.of(found, "confidence")


class Memorisation(Read):
    """How much of the answer the model writes by itself."""

    good = "low"

    over: Literal["window", "answer"] = "window"
    """The first 32 tokens, or all."""
    exact: bool = False
    """Whether the model generates greedily, which costs a step per token, instead of being shown the true tokens."""

    def passes(self) -> tuple[Pass, ...]:
        """See `Read.passes`."""
        if not self.exact:
            return (Answer(),)
        return (Greedy(WINDOW if self.over == "window" else None),)

    def score(self, reading: Reading) -> Array:
        """Between 0 and 1, [N]."""
        first = self.over == "window" and not self.exact
        return reading.of(self.passes()[0], "first_hits" if first else "hits")


class PromptUncertainty(Read):
    """How far the answer's probability moves when words of the question are missing."""

    times: int = Field(20, ge=1, le=1_000)
    """Perturbed questions per row."""
    drop: float = Field(0.2, gt=0, lt=1)
    """Probability that a word of the question is dropped."""
    per: Literal["token", "answer"] = "token"
    """Compare every answer token's probability (the survey), or the answers' likelihoods per token (official code)."""
    seed: int = Field(0, ge=0)
    """Of the words dropped."""

    def passes(self) -> tuple[Pass, ...]:
        """See `Read.passes`."""
        return (Perturbed(self.times, self.drop, self.seed),)

    def score(self, reading: Reading) -> Array:
        """Between 0 and 1, [N]."""
        return reading.of(self.passes()[0], self.per)
