"""ULD: distil between models with different vocabularies, by the shapes of their distributions.

The idea. Two tokenizers share no words to compare, but both models are sure or unsure at the same places of a text.
Moving mass between words at an equal price whatever the words are, the transport cost between two distributions is
the distance of their sorted probabilities, which needs no common vocabulary. Per aligned position, τ = 1,

    q = softmax(s / τ)    p = softmax(t / τ)    ℓ = Σ_r |q_(r) − p_(r)|

where q_(1) ≥ q_(2) ≥ … are the sorted probabilities, the shorter vector padded with zeros. The loss does not say
*which* word is right: the paper adds the cross-entropy of the reference answer, `label-weight` of the recipe.

The paper's: the loss, and pairing the first min(Ts, Tt) tokens of the two answers by their number. Ours: pairing
positions at which both models have read exactly the same text (`aligned_positions`); the k-th token of one answer has
nothing to do with the k-th of another tokenizer's.

Cost. A sort of each row, which dominates: exact, in the dense and in the fused form, a few tokens at a time in the
latter, with no [N, V].

Paper: Boizard, El Haddad, Hudelot, Colombo, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
Loss for LLMs", TMLR 2025, arXiv 2402.12030. Official code: github.com/Nicolas-BZRD/llm-recipes, commit 0bfcb37.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from residency.compress.divergence import SoftmaxDivergence
from residency.step import Params


class ULDParams(Params):
    """Parameters of `ULD`."""

    temperature: float = Field(1.0, gt=0)
    """Divisor of both models' logits."""


class ULD(SoftmaxDivergence):
    """The L1 distance of sorted probabilities.

    Inputs: logits, or hidden states and heads, of teacher and student at aligned positions; vocabularies may differ.
    Relations: with one vocabulary every other loss says more; `SinKD` with `plan: sample` is its entropic form.

    Example:
        >>> pairs = aligned_positions(student_offsets, teacher_offsets)
        >>> mine, theirs = zip(*pairs)
        >>> total, count = ULD().dense(student_logits[list(mine)], teacher_logits[list(theirs)])
    """

    Params = ULDParams
    params: ULDParams
    one_vocabulary = False

    def between(self, q: Tensor, p: Tensor) -> Tensor:
        """See `SoftmaxDivergence.between`; the teacher's p is [n, Vt]."""
        q, p = (x.sort(1, descending=True).values for x in (q, p))
        both = min(q.shape[1], p.shape[1])
        # sorted and non-negative: what has no partner counts as it is
        return (q[:, :both] - p[:, :both]).abs().sum() + q[:, both:].sum() + p[:, both:].sum()


def aligned_positions(
    student: Sequence[tuple[int, int]], teacher: Sequence[tuple[int, int]], *, start: int | None = None
) -> list[tuple[int, int]]:
    """Pairs of tokens before which both tokenizers have consumed exactly the same text.

    At token i a causal model predicts token i from all text before it, so two predictions are comparable where that
    text is the same. A token that begins inside a character which the token before it left unfinished (byte-level
    tokenizers split emoji) is no such place. A token of no width (end of text) consumes nothing.

    Args:
        student: (start, end) character offsets of the student's trained tokens, in order.
        teacher: The same of the teacher's, on the same text.
        start: Where both answers begin, in characters; by default where the earlier of the two first tokens does.

    Returns:
        Pairs (i, j) of indices into the two lists, both ascending.

    Raises:
        ValueError: When offsets go backwards.
    """
    if not student or not teacher:
        return []
    origin = min(student[0][0], teacher[0][0]) if start is None else start
    mine, theirs = _consumed(student, origin, "student"), _consumed(teacher, origin, "teacher")
    pairs, i, j = [], 0, 0
    while i < len(mine) and j < len(theirs):
        (a, token), (b, other) = mine[i], theirs[j]
        if a == b:
            pairs.append((token, other))
        i, j = i + (a <= b), j + (b <= a)
    return pairs


def _consumed(offsets: Sequence[tuple[int, int]], origin: int, whose: str) -> list[tuple[int, int]]:
    """(characters consumed, index) before each token that begins at the end of a character."""
    found, consumed = [], origin
    for index, (begin, end) in enumerate(offsets):
        if end < begin or (begin < end < consumed):
            raise ValueError(f"the {whose}'s offsets go backwards at token {index}: ({begin}, {end}) after {consumed}")
        if begin == end or begin >= consumed:
            found.append((consumed, index))
        if end > begin:
            consumed = max(consumed, end)
    return found
