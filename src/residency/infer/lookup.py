"""Prompt lookup: guess that what followed these tokens before follows them again.

The last n tokens (n from `ngram` down to 1) are searched in the row's own text, prompt and answer so far; the tokens
after an earlier occurrence are the guess, a chain. No parameters, no training, no cost to speak of; it pays where
answers quote their prompt or themselves. transformers' `prompt_lookup_num_tokens` takes the earliest occurrence; we
take the latest that is followed by enough tokens (our choice), for which runs are indexed and not searched.

`WithLookup` puts that chain into another drafter's tree, where the two share what they agree on (ours): a trained draft
knows the domain, the lookup knows this very text, and a few nodes more cost the target next to nothing.

Source: Saxena, "Prompt Lookup Decoding", 2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residency.infer.drafter import Proposer
from residency.infer.tree import Tree, TreePolicy


class PromptLookup:
    """Guesses from the text itself.

    Args:
        tokens: Longest guess; the tree policy of `Drafted` is not asked, but its depth bounds the guess too when it is
            smaller.
        ngram: Longest run of tokens that is looked up.

    Raises:
        ValueError: When one of them is below 1.
    """

    wants_hidden = False

    def __init__(self, tokens: int = 5, ngram: int = 3) -> None:
        if min(tokens, ngram) < 1:
            raise ValueError(f"tokens and ngram are at least 1, not {tokens} and {ngram}")
        self.tokens, self.ngram = tokens, ngram

    def attach(self, target: PreTrainedModel) -> PromptLookup:
        """Nothing to borrow."""
        return self

    def parts(self) -> list[nn.Module]:
        """Nothing to pack."""
        return []

    def start(self, batch: int, capacity: int) -> None:
        """A new text begins."""
        self.text: list[list[int]] = [[] for _ in range(batch)]
        self.where: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(batch)]

    def observe(self, hidden: Tensor, following: Tensor, counts: Sequence[int], pads: Sequence[int]) -> None:
        """Append what is certain, and note where each run of tokens was continued."""
        fresh = not any(self.text)
        for row, (ids, n) in enumerate(zip(following.tolist(), counts, strict=True)):
            text, where = self.text[row], self.where[row]
            for token in ids[pads[row] if fresh else 0 : n]:
                for size in range(1, min(self.ngram, len(text)) + 1):
                    where.setdefault(tuple(text[-size:]), []).append(len(text))
                text.append(token)

    def draft(self, roots: Tensor, policy: TreePolicy, levels: int, sample: float | None = None) -> Tree:
        """See `Drafter.draft`."""
        guesses = [self._guess(row, min(levels, self.tokens)) for row in range(len(roots))]
        width = max(map(len, guesses))
        B, device = len(roots), roots.device
        tokens = torch.zeros(B, width, dtype=torch.long)
        alive = torch.zeros(B, width, dtype=torch.bool)
        for row, guess in enumerate(guesses):
            tokens[row, : len(guess)] = torch.tensor(guess, dtype=torch.long)
            alive[row, : len(guess)] = True
        chain = torch.arange(-1, width, device=device).expand(B, -1)
        one = torch.ones(B, 1, dtype=torch.bool, device=device)
        return Tree(
            torch.cat((roots[:, None], tokens.to(device)), 1), chain, chain + 1, torch.cat((one, alive.to(device)), 1)
        )

    def _guess(self, row: int, longest: int) -> list[int]:
        """What followed the row's last tokens before."""
        text, where = self.text[row], self.where[row]
        for size in range(min(self.ngram, len(text)), 0, -1):
            if found := where.get(tuple(text[-size:])):
                at = found[max(0, bisect_right(found, len(text) - longest) - 1)]
                return text[at : at + longest]
        return []


class WithLookup:
    """A drafter's tree with the chain of prompt lookup in it.

    Args:
        drafter: Any drafter.
        lookup: What is looked up; by default chains of up to five tokens.
    """

    def __init__(self, drafter: Proposer, lookup: PromptLookup | None = None) -> None:
        self.drafter, self.lookup = drafter, lookup or PromptLookup()
        self.wants_hidden = drafter.wants_hidden

    def attach(self, target: PreTrainedModel) -> WithLookup:
        """See `Drafter.attach`."""
        self.drafter.attach(target)
        return self

    def parts(self) -> list[nn.Module]:
        """See `Proposer.parts`: the drafter's."""
        return self.drafter.parts()

    def start(self, batch: int, capacity: int) -> None:
        """A new text begins."""
        self.drafter.start(batch, capacity)
        self.lookup.start(batch, capacity)

    def observe(self, hidden: Tensor, following: Tensor, counts: Sequence[int], pads: Sequence[int]) -> None:
        """Both take in what is certain."""
        self.drafter.observe(hidden, following, counts, pads)
        self.lookup.observe(hidden, following, counts, pads)

    def draft(self, roots: Tensor, policy: TreePolicy, levels: int, sample: float | None = None) -> Tree:
        """The drafter's tree, with the chain merged in; drawn trees (`sample`) are left as they were drawn."""
        tree = self.drafter.draft(roots, policy, levels, sample)
        if sample is not None:
            return tree
        more = [self._beyond(tree, row, levels) for row in range(len(roots))]
        width = max(map(len, more))
        if not width:
            return tree
        extra = torch.zeros(len(more), width, 3, dtype=torch.long)
        alive = torch.zeros(len(more), width, dtype=torch.bool)
        for row, nodes in enumerate(more):
            extra[row, : len(nodes)] = torch.tensor(nodes, dtype=torch.long).view(-1, 3)
            alive[row, : len(nodes)] = True
        extra, alive = extra.to(roots.device), alive.to(roots.device)
        return Tree(
            torch.cat((tree.tokens, extra[..., 0]), 1),
            torch.cat((tree.parents, extra[..., 1]), 1),
            torch.cat((tree.depth, extra[..., 2]), 1),
            torch.cat((tree.alive, alive), 1),
        )

    def _beyond(self, tree: Tree, row: int, levels: int) -> list[tuple[int, int, int]]:
        """(token, parent, depth) of the chain's nodes that the tree lacks."""
        guess = self.lookup._guess(row, min(levels, self.lookup.tokens))
        n = tree.tokens.shape[1]
        known = {
            (int(tree.parents[row, i]), int(tree.tokens[row, i])): i for i in range(1, n) if bool(tree.alive[row, i])
        }
        node = 0
        found: list[tuple[int, int, int]] = []
        for depth, token in enumerate(guess, start=1):
            child = known.get((node, token))
            if child is None:
                child = n + len(found)
                found.append((token, node, depth))
            node = child
        return found
