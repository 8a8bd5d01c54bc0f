"""InsTag's choice: the rows with most tags first, as long as they bring a tag that is not yet covered.

    covered ← ∅; walk the rows left by falling number of tags:
        take a row when it has a tag outside `covered`, and add its tags
    at the end of the walk begin again with covered ← ∅, until `keep` rows are taken

Rows with many tags are complex instructions; each walk takes a small set of them that covers every tag.

Paper: Lu et al., "#InsTag: Instruction Tagging for Analyzing Supervised Fine-tuning of Large Language Models", ICLR
2024, arXiv 2308.07074, algorithm 1 (complexity-first diverse sampling). Official code: OFA-Sys/InsTag @aac3dc1 (a
description, no selector).

Our choices: rows with equally many tags come by quality, if there is one, then by row order; rows without tags are
never taken, as they never bring one; nor are rows without a quality (NaN) where qualities are given.

Cost: O(walks · rows left · tags), at most one walk per row with the rarest tag; memory O(N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from residency.curate.ranking import NO_QUALITY
from residency.curate.scoring import Budgeted, Selection
from residency.curate.vectors import qualities


class InsTag(Budgeted):
    """Complexity-first diverse sampling."""

    needs = ("tags", "quality?")

    def select(self, tags: Sequence[Sequence[str]], quality: Any = None) -> Selection:
        """Choose.

        Args:
            tags: Tags of the N rows.
            quality: [N] or None, for rows with equally many tags.

        Returns:
            The rows as taken; score is the number of a row's different tags.

        Raises:
            ValueError: When there is not one quality per row.
        """
        sets = [frozenset(row) for row in tags]
        value = np.zeros(len(sets)) if quality is None else qualities(quality, len(sets))
        score = np.array([len(s) for s in sets], np.float64)
        reasons = [NO_QUALITY if np.isnan(v) else "dropped: has no tag" for v in value.tolist()]
        order = np.lexsort((-value, -score))
        left = [int(i) for i in order if score[i] and not np.isnan(value[i])]
        for i in left:
            reasons[i] = f"dropped: its {len(sets[i])} tags were covered, budget spent"
        chosen: list[int] = []
        walk = 0
        while left and len(chosen) < self.keep:
            walk += 1
            covered: set[str] = set()
            passed = []
            for place, i in enumerate(left):
                if len(chosen) == self.keep:
                    passed += left[place:]
                    break
                new = sets[i] - covered
                if not new:
                    passed.append(i)
                    continue
                covered |= new
                chosen.append(i)
                reasons[i] = f"kept: {len(new)} of its {len(sets[i])} tags were not covered (walk {walk:,})"
            left = passed
        return Selection(np.array(chosen, np.int64), score, reasons)
