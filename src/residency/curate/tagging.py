"""Tags without a model: the words that set a text apart from the others.

A text's tags are its k words with the highest tf · idf, idf = log(N / f_w) of the words (lower case, digits and
punctuation gone) in the texts given. A word in every text has idf 0 and is no tag. Ties go to the earlier word.

Our choice, in place of the taggers of InsTag (Lu et al., 2308.07074) and InsCL (2403.11435), which ask a chat model;
whoever has one passes its tags instead. Term weighting: Spärck Jones 1972; Salton & Buckley 1988.

Cost: linear in the words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from residency.curate.lexicaltokens import words


def keywords(texts: Sequence[str], per_text: int = 3) -> list[tuple[str, ...]]:
    """Tags of texts.

    Args:
        texts: N texts.
        per_text: Tags per text, at most.

    Returns:
        N tuples of words, the most telling first.
    """
    split = [words(text) for text in texts]
    times = Counter(word for each in split for word in set(each))
    found = []
    for each in split:
        counts = Counter(each)
        weight = {word: n * math.log(len(texts) / times[word]) for word, n in counts.items()}
        telling = sorted((word for word in weight if weight[word] > 0), key=lambda word: -weight[word])
        found.append(tuple(telling[:per_text]))
    return found
