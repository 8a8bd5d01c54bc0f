"""How hard a text is to read, by the classic formulas for English: Flesch reading ease and Gunning fog.

With W words, S sentences, Y syllables and C words of three syllables or more:

    Flesch   206.835 − 1.015 W / S − 84.6 Y / W        100 is very easy, 0 very hard, no bounds
    Fog      0.4 (W / S + 100 C / W)                   years of school

The syllable rule (ours): groups of the vowels a e i o u y; one less for a silent final e (kept in consonant + le, as
in table), for "es" unless it is spoken (after s, x, z, c, g, ch, sh) and for "ed" unless after t or d; one more where
two vowels are two sounds (i before a, o, u or final um; not in tion, sion, cian …); at least one. It agrees with one
of the CMU dictionary's counts for 98 % of the running words of 600 questions and answers, and for 91 % of the
dictionary's 117,000 words. Sentences end in . ! ? or … before white space or the end; line breaks end them too. Words
are runs of letters, with apostrophes inside. A text without words is NaN. For other languages the numbers compare
texts but have no scale.

Flesch (1948), "A new readability yardstick", Journal of Applied Psychology; Gunning (1952), The Technique of Clear
Writing (his exceptions for names and joined words are left out). As data scores: survey 2408.02085. Dale-Chall needs a
list of 3,000 words whose licence is not clear, and is not here; `textstat` has it. Cost: linear; each different word
is looked at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from residency.curate.scoring import Array, Score

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_END = re.compile(r"[.!?…]+(?=[\s\"'”’)\]]|$)|\n+")
_VOWELS = re.compile(r"[aeiouyàáâãäåæèéêëìíîïòóôõöøùúûüýœ]+")
_SILENT = re.compile(
    r"(?:[^aeiouyl]e|[aeiouyr]le|[^aeiouycgsxzhl]es|[aeiouyr]les|[^cs]hes|[^aeiouydt]ed)$|[^aeiouyl]e(?=(?:ments?|less|ly|ty)$)"
)
_SPLIT = re.compile(r"(?<![cstg])i(?:a|o|u(?!s$)|um$)|(?<=[^q])ua|eo|[aeo]ing$|ism$")


@lru_cache(100_000)
def syllables(word: str) -> int:
    """Syllables of an English word, by the rule above."""
    word = word.lower().replace("’", "'").removesuffix("'s")
    count = len(_VOWELS.findall(word)) - len(_SILENT.findall(word)) + len(_SPLIT.findall(word))
    return max(1, count)


class Readability(Score):
    """How hard a row is to read."""

    good = "middle"

    form: Literal["flesch", "fog"] = "flesch"
    """Reading ease (high = easy), or years of school (high = hard)."""

    def score(self, texts: Sequence[str]) -> Array:
        """The formula's value per row, [N]; NaN for a text without words.

        Args:
            texts: N texts.
        """
        return np.array([self._of(text) for text in texts], float)

    def _of(self, text: str) -> float:
        words = _WORD.findall(text)
        if not words:
            return np.nan
        sentences = sum(bool(_WORD.search(part)) for part in _END.split(text))
        spoken = [syllables(word) for word in words]
        if self.form == "flesch":
            return 206.835 - 1.015 * len(words) / sentences - 84.6 * sum(spoken) / len(words)
        return 0.4 * (len(words) / sentences + 100 * sum(y >= 3 for y in spoken) / len(words))
