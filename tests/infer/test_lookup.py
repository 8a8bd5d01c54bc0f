"""Prompt lookup: what it finds, brute force beside it."""

from __future__ import annotations

import random

import pytest
import torch

from residency.infer.lookup import PromptLookup, WithLookup
from residency.infer.tree import DynamicTree, Tree


def brute(text, tokens, ngram):
    """The latest earlier occurrence that has `tokens` after it, else the earliest; longest runs first."""
    for size in range(min(ngram, len(text)), 0, -1):
        ends = [e for e in range(size, len(text)) if text[e - size : e] == text[-size:]]
        if ends:
            full = [e for e in ends if e + tokens <= len(text)]
            at = full[-1] if full else ends[0]
            return text[at : at + tokens]
    return []


def test_equals_a_search():
    rng = random.Random(0)
    for _ in range(40):
        drafter = PromptLookup(tokens=3, ngram=3)
        drafter.start(1, 0)
        text = [rng.randrange(4) for _ in range(rng.randrange(1, 30))]
        cut = rng.randrange(1, len(text) + 1)
        empty = torch.zeros(1, 1, 0)
        drafter.observe(empty, torch.tensor([text[:cut]]), [cut], [0])
        if text[cut:]:
            drafter.observe(empty, torch.tensor([text[cut:]]), [len(text) - cut], [0])
        tree = drafter.draft(torch.tensor(text[-1:]), DynamicTree(), levels=5)
        assert tree.tokens[0, 1:].tolist() == brute(text, 3, 3)


def test_padding_is_not_text():
    drafter = PromptLookup()
    drafter.start(2, 0)
    drafter.observe(torch.zeros(2, 3, 0), torch.tensor([[0, 0, 7], [7, 8, 7]]), [3, 3], [2, 0])
    tree = drafter.draft(torch.tensor([7, 7]), DynamicTree(), levels=5)
    assert tree.alive.tolist() == [[True, False, False], [True, True, True]]
    assert tree.tokens[1].tolist() == [7, 8, 7]
    with pytest.raises(ValueError, match="at least 1"):
        PromptLookup(ngram=0)


def test_a_chain_joins_a_tree_where_they_agree():
    class Fixed:
        wants_hidden = True

        def draft(self, roots, policy, levels, sample=None):
            tokens = torch.tensor([[7, 8, 9, 3]]).expand(2, -1).clone()
            return Tree(
                tokens, torch.tensor([[-1, 0, 0, 1]] * 2), torch.tensor([[0, 1, 1, 2]] * 2), torch.ones(2, 4).bool()
            )

        def attach(self, target):
            pass

        def start(self, batch, capacity):
            pass

        def observe(self, *given):
            pass

    both = WithLookup(Fixed(), PromptLookup(tokens=4, ngram=2))
    both.start(2, 0)
    both.observe(torch.zeros(2, 6, 0), torch.tensor([[5, 7, 8, 4, 1, 7], [1, 2, 3, 4, 5, 6]]), [6, 6], [0, 0])
    tree = both.draft(torch.tensor([7, 6]), DynamicTree(), levels=3)
    # row 0: after 7 came 8 4 1: 8 is node 1 already, 4 and 1 hang below it; row 1: 6 is new, nothing to look up
    assert tree.tokens[0].tolist() == [7, 8, 9, 3, 4, 1]
    assert tree.parents[0].tolist() == [-1, 0, 0, 1, 1, 4]
    assert tree.depth[0].tolist() == [0, 1, 1, 2, 2, 3]
    assert tree.alive.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
