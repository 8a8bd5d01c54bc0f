"""Did the model write exactly the reference answer, up to trivia?

Both texts are normalised as in SQuAD's official script, in this order: lower case; ASCII punctuation removed; the
words "a", "an", "the" removed; runs of white space made one blank. Then they are equal or not:

    score_i = max over references r of [ normalise(prediction_i) = normalise(r) ]

What this does not do, on purpose, so that numbers compare with published ones: other languages' articles and
punctuation stay ("¿" is no ASCII), digits and words for numbers differ, accents count.

Paper: Rajpurkar, Zhang, Lopyrev & Liang 2016, "SQuAD", arXiv 1606.05250, section 6.1. Official code: evaluate-v1.1.py.
Empty-set policy: no items is an error (see `metric`). An item whose reference normalises to nothing is right if the
prediction does too, as in the official script.
Cost: linear in the text. Relations: `rouge_l` gives partial credit; `choice` needs no generation.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import ClassVar

from residency.errors import DataError
from residency.evaluate.metric import Item, Metric

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """SQuAD's normalisation of an answer."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


class ExactMatch(Metric):
    """Share of items answered exactly. State: one item each."""

    name: ClassVar[str] = "exact-match"

    def update(self, id: str, prediction: str, targets: str | Sequence[str]) -> None:
        """Score one item against one or several references.

        Raises:
            DataError: There is no reference, or the id was scored before.
        """
        references = [targets] if isinstance(targets, str) else list(targets)
        if not references:
            raise DataError("the item has no reference answer", where=id, hint="drop the row")
        said = normalise(prediction)
        right = any(said == normalise(reference) for reference in references)
        self.add(Item(id, float(right), prediction=prediction))
