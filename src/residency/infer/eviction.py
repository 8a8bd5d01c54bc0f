"""What to keep when a cache is full: one protocol, and the baselines CItruS is measured against.

A policy says whose attention it wants to see and turns that into a priority per cached entry; `choose` keeps the
entries of highest priority, in their old order. All policies run in the same loop (`prefill`): a text is read chunk by
chunk, after each chunk the older entries are cut to the budget k while the chunk itself stays whole, so that a cache
holds at most k + c entries between chunks; at the end the prompt's last tokens, the instruction, are run over the
cache, the policy sees their attention too, and k entries remain. So every policy holds the same number of entries.

    policy     sees                                     keeps                                          per head
    Streaming  nothing                                  the first s and the most recent                no
    H2O        all tokens, summed over the text         the recent half, and the largest sums          yes
    TOVA       the last token so far                    the most attended                              no
    SnapKV     the instruction, once, after everything  the most attended, smoothed over neighbours    yes

The papers': the four criteria. Our choice: evicting once per chunk instead of once per token, so that prefill stays a
few large passes; the cut at the end for all alike. With SnapKV nothing is evicted while reading: its memory during
prefill grows with the text, and only what remains for decoding is bounded. Attention is summed as probabilities over
query tokens and averaged over the query heads that share a key/value head (and over all heads where one choice serves
the whole layer). None of them sees the instruction while it reads; that is what `citrus` adds.

Papers: StreamingLLM: Xiao, Tian, Chen, Han, Lewis, "Efficient Streaming Language Models with Attention Sinks", ICLR
2024, arXiv 2309.17453. H2O: Zhang, Sheng, Zhou et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of
LLMs", NeurIPS 2023, arXiv 2306.14048. TOVA: Oren, Hassid, Yarden, Adi, Schwartz, "Transformers are Multi-State RNNs",
EMNLP 2024, arXiv 2401.06104. SnapKV: Li, Huang, Yang et al., NeurIPS 2024, arXiv 2404.14469. Official codes: not used;
the criteria were compared with kvpress (github.com/NVIDIA/kvpress, commit 8bb29b9). Cost: [B, G, S] numbers per layer
and pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

Asks = Literal["chunk", "last", "instruction"]


class Policy:
    """What is kept of a cache, by a number per entry.

    Class attributes:
        asks: Whose attention is seen while reading: every token of the chunk, its last, the instruction, or nobody's.
        heads: Whether every key/value head keeps entries of its own.
        whole: Whether nothing is evicted before the whole text is read.
        accumulates: Whether scores are carried on from pass to pass.
        separate: Whether chunks are read through a cache of their own (CItruS' individual caches).
        bounded: Whether it can go on evicting while an answer is written.
        endless: Whether it never evicts.
    """

    asks: ClassVar[Asks | None] = None
    heads: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    separate: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    endless: ClassVar[bool] = False

    def score(self, mass: Tensor, asked: Tensor, before: Tensor | None) -> Tensor:
        """Scores [B, g, S] of all entries.

        Args:
            mass: Attention that the asked tokens pay, summed over them, [B, G, S] (`watch.attention_mass`).
            asked: How many tokens were asked, [B].
            before: Scores so far, [B, g, S], with zeros for new entries; None unless the policy accumulates.
        """
        del before
        return mass.mean(1, keepdim=True) / asked.clamp(min=1)[:, None, None]

    def rank(self, scores: Tensor, order: Tensor, total: Tensor, budget: int) -> Tensor:
        """Priorities [B, g, S]: the entries of highest priority stay.

        Args:
            scores: What `score` gave, [B, g, S]; zeros when nobody was asked.
            order: How many tokens stand before an entry, [B, S].
            total: Tokens held per row, [B].
            budget: Entries k that will remain of those that may go.
        """
        del order, total, budget
        return scores

    def check(self, budget: int) -> None:
        """Refuse a budget that leaves no choice.

        Raises:
            ValueError: When it is too small for this policy.
        """
        if budget < 1:
            raise ValueError(f"a budget is at least 1 entry, got {budget}")


class Full(Policy):
    """Keeps everything: plain attention, read in chunks."""

    whole: ClassVar[bool] = True
    endless: ClassVar[bool] = True

    def check(self, budget: int) -> None:
        """Any budget will do: it is not looked at."""


@dataclass(frozen=True)
class Streaming(Policy):
    """The first tokens, on which models park attention they do not need, and the most recent ones.

    Args:
        sinks: How many of the first (s); the paper's 4.
    """

    bounded: ClassVar[bool] = True
    sinks: int = 4

    def rank(self, scores: Tensor, order: Tensor, total: Tensor, budget: int) -> Tensor:
        """See `Policy.rank`."""
        recent = order.to(torch.float32)
        return torch.where(order < self.sinks, torch.inf, recent)[:, None]

    def check(self, budget: int) -> None:
        """See `Policy.check`."""
        if not 0 <= self.sinks < budget:
            raise ValueError(f"{self.sinks} first tokens do not fit into a budget of {budget} with any recent one")


@dataclass(frozen=True)
class H2O(Policy):
    """Heavy hitters: entries that have received most attention so far, and the recent ones, per key/value head.

    Args:
        recent: Share of the budget that belongs to the most recent; the paper's half.
    """

    asks: ClassVar[Asks | None] = "chunk"
    heads: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    recent: float = 0.5

    def score(self, mass: Tensor, asked: Tensor, before: Tensor | None) -> Tensor:
        """See `Policy.score`."""
        return mass if before is None else before + mass

    def rank(self, scores: Tensor, order: Tensor, total: Tensor, budget: int) -> Tensor:
        """See `Policy.rank`."""
        newest = order >= (total - int(self.recent * budget))[:, None]
        return torch.where(newest[:, None], torch.inf, scores)


class TOVA(Policy):
    """Whatever the last token attends to least goes, all heads of a layer together."""

    asks: ClassVar[Asks | None] = "last"
    bounded: ClassVar[bool] = True


@dataclass(frozen=True)
class SnapKV(Policy):
    """The prompt's last tokens score the whole text once; neighbours of what they attend to stay with it.

    Args:
        kernel: Width of the average over neighbours, odd; 5 as in the maintained implementation.
    """

    asks: ClassVar[Asks | None] = "instruction"
    heads: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    kernel: int = 5

    def score(self, mass: Tensor, asked: Tensor, before: Tensor | None) -> Tensor:
        """See `Policy.score`."""
        shares = mass / asked.clamp(min=1)[:, None, None]
        return functional.avg_pool1d(shares, self.kernel, stride=1, padding=self.kernel // 2)

    def check(self, budget: int) -> None:
        """See `Policy.check`."""
        super().check(budget)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"the kernel has one entry in its middle, so it is odd; got {self.kernel}")


def choose(priority: Tensor, real: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of highest priority, in their old order.

    Args:
        priority: [B, g, S].
        real: Which entries stand for tokens, [B, S]; others are never kept while there is a real one.
        count: How many to keep per row, [B], at most as many as are real.

    Returns:
        Indices [B, g, W] with W the largest count, rising; and which of the W are real, [B, W]: rows that keep fewer
        have spare places at the left.
    """
    width, size = int(count.max()), priority.shape[2]
    best = priority.masked_fill(~real[:, None], -torch.inf).topk(width, dim=2).indices
    spare = torch.arange(width, device=real.device) >= count[:, None]  # [B, W], by rank
    order = torch.where(spare[:, None], best - size, best).sort(2).values
    return torch.where(order < 0, order + size, order), order[:, 0] >= 0
