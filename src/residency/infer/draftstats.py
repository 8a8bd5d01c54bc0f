"""What a decoding with a drafter did: steps, tokens, which guesses came true, and where the time went.

The two views of the same counts: `lengths` is the distribution of accepted guesses per step, whose mean plus one is
the tokens per step; `accepted` over `offered` is how often the guess at each position came true where there was one.

Cost: a few additions per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from residency.infer.tree import Tree
from residency.infer.verify import Verdict


@dataclass
class DraftStats:
    """What one call of `generate` did.

    Args:
        steps: Passes of the target after the prompt's.
        tokens: Tokens these gave, over all rows.
        rows: Rows that were alive, summed over steps (= steps at batch 1).
        nodes: Nodes the target read, over all rows.
        lengths: Number of accepted guesses → how often.
        offered, accepted: Per level (from 1): in how many row-steps the tree had a node there, and one was accepted.
        prompt_seconds, draft_seconds, verify_seconds, other_seconds: Wall time by what it was spent on.
    """

    steps: int = 0
    tokens: int = 0
    rows: int = 0
    nodes: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    offered: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)
    prompt_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens per row and step; 1 is plain decoding."""
        return self.tokens / max(1, self.rows)

    @property
    def decode_seconds(self) -> float:
        """Wall time of all steps, without the prompt's pass."""
        return self.draft_seconds + self.verify_seconds + self.other_seconds

    def add(self, other: DraftStats) -> None:
        """Sum two calls."""
        for name in ("steps", "tokens", "rows", "nodes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("prompt_seconds", "draft_seconds", "verify_seconds", "other_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("lengths", "offered", "accepted"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + value

    def count(self, tree: Tree, verdicts: Sequence[Verdict], done: Sequence[bool]) -> None:
        """Take in one step.

        Args:
            tree: What was drafted.
            verdicts: What became of it, per row.
            done: Which rows had ended before; they do not count.
        """
        self.steps += 1
        depths = tree.depth.masked_fill(~tree.alive, 0)
        for b, verdict in enumerate(verdicts):
            if done[b]:
                continue
            self.rows += 1
            self.nodes += int(tree.alive[b].sum())
            taken = len(verdict.path) - 1
            self.lengths[taken] = self.lengths.get(taken, 0) + 1
            for level in range(1, int(depths[b].max()) + 1):
                self.offered[level] = self.offered.get(level, 0) + 1
                self.accepted[level] = self.accepted.get(level, 0) + (level <= taken)
