"""Which drafted tokens the target itself would have said: acceptance without changing its distribution.

The target's logits at every node of a tree are known after one forward pass. From the root on, three ways of walking:

- greedy: go to the child that is the argmax, as long as there is one; the last argmax is a free token on top;
- matching: draw the next token from the target's (processed) distribution p, and go to the child that carries it, as
  long as there is one. The tokens are draws from p by construction, whatever was drafted. For candidates that were
  not drawn (a drafter's most probable tokens) no other rule accepts more often: a child c is reached with p(c);
- rejection: candidates are drawn from the drafter's q, without replacement, and tried in the order they were drawn:
  c is accepted with probability min(1, p(c) / q(c)); otherwise p ← norm(max(p − q, 0)) and q ← norm(q without c);
  when no child is left, the token is drawn from the p that remains. Emits exactly p as well (Leviathan et al.,
  algorithm 1, for one candidate; the recursion over siblings is SpecInfer's and EAGLE's).

The official Clover-2 code (EAGLE-1's) draws the token after a fully accepted path from the raw logits and so changes
the distribution whenever the temperature is not 1; here every token goes through the processors, each with its own
prefix. Floating point allows one freedom: a tree pass and a one-token pass may round differently, so a greedy choice
between two tokens whose logits agree to about 1e-4 can differ from plain decoding.

Cost: an argmax over [B, n, V] (greedy), or one processed distribution per accepted token.

Papers: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023, arXiv
2211.17192; Miao et al., "SpecInfer", ASPLOS 2024, arXiv 2305.09781; Li et al., EAGLE, ICML 2024, arXiv 2401.15077.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from residency.infer.tree import Tree

Process = Callable[[int, list[int], Tensor], Tensor]
"""(row, tokens on the way from the root, raw logits [V]) → processed logits [V]."""


@dataclass
class Verdict:
    """What one step of one row gave.

    Args:
        path: Accepted columns of the tree, the root first.
        tokens: The tokens it adds: those of `path[1:]`, then one of the target's own.
    """

    path: list[int] = field(default_factory=lambda: [0])
    tokens: list[int] = field(default_factory=list)


def children(tree: Tree) -> list[list[list[int]]]:
    """Per row and node, its living children in the order in which they were drafted."""
    found = []
    for parents, alive in zip(tree.parents.tolist(), tree.alive.tolist(), strict=True):
        below: list[list[int]] = [[] for _ in parents]
        for node, (parent, lives) in enumerate(zip(parents, alive, strict=True)):
            if parent >= 0 and lives:
                below[parent].append(node)
        found.append(below)
    return found


def greedy(tree: Tree, logits: Tensor, process: Process | None = None) -> list[Verdict]:
    """Follow the argmax.

    Args:
        tree: What was drafted, [B, n].
        logits: [B, n, V] of the target.
        process: Logits processors, or None.

    Returns:
        A verdict per row.
    """
    best = logits.argmax(-1).tolist() if process is None else None

    def choose(row: int, node: int, said: list[int]) -> int:
        if best is not None:
            return best[row][node]
        assert process is not None
        return int(process(row, said, logits[row, node]).argmax())

    return _walk(tree, choose)


def matching(tree: Tree, logits: Tensor, process: Process | None = None) -> list[Verdict]:
    """Draw from the target and follow the child that carries what was drawn; random state is torch's global one."""

    def choose(row: int, node: int, said: list[int]) -> int:
        own = logits[row, node] if process is None else process(row, said, logits[row, node])
        return int(torch.multinomial(own.float().softmax(-1), 1))

    return _walk(tree, choose)


def _walk(tree: Tree, choose: Callable[[int, int, list[int]], int]) -> list[Verdict]:
    tokens, below = tree.tokens.tolist(), children(tree)
    verdicts = []
    for row, ids in enumerate(tokens):
        verdict, node = Verdict(), 0
        while True:
            token = choose(row, node, verdict.tokens)
            verdict.tokens.append(token)
            found = next((c for c in below[row][node] if ids[c] == token), None)
            if found is None:
                break
            verdict.path.append(node := found)
        verdicts.append(verdict)
    return verdicts


def rejection(
    tree: Tree, logits: Tensor, process: Process | None = None, vocabulary: Tensor | None = None
) -> list[Verdict]:
    """Accept drawn candidates by the ratio of the target's and the drafter's probability.

    Args:
        tree: With `drawn_from`: children were drawn without replacement from the drafter's distributions.
        logits: [B, n, V] of the target.
        process: Logits processors, or None.
        vocabulary: [V'] ids the drafter's distributions are over, or None for all V.

    Returns:
        A verdict per row.

    Raises:
        ValueError: When the tree does not say how its tokens were drawn.
    """
    if not tree.drawn_from:
        raise ValueError(
            "rejection sampling needs a tree whose tokens were drawn (Tree.drawn_from); use `matching` for this one"
        )
    tokens, below = tree.tokens.tolist(), children(tree)
    verdicts = []
    for row, ids in enumerate(tokens):
        logqs = {
            int(column): level[row, i] for level, columns in tree.drawn_from for i, column in enumerate(columns[row])
        }
        verdict, node = Verdict(), 0
        while True:
            own = logits[row, node] if process is None else process(row, verdict.tokens, logits[row, node])
            p, logq = own.double().softmax(-1), None
            accepted = None
            for child in below[row][node]:
                if logq is None:
                    logq = torch.full_like(p, -torch.inf)
                    logq[slice(None) if vocabulary is None else vocabulary] = logqs[node].double()
                token = ids[child]
                logq = logq.log_softmax(-1)  # of what was not drawn yet
                if float(torch.rand(())) * float(logq[token].exp()) < float(p[token]):
                    accepted = child
                    break
                p = (p - logq.exp()).clamp_min(0)
                if not float(p.sum()) > 0:  # p = q up to rounding: nothing is left but what was rejected by a hair
                    p = own.double().softmax(-1)
                p = p / p.sum()
                logq[token] = -torch.inf
            if accepted is None:
                verdict.tokens.append(int(torch.multinomial(p, 1)))
                break
            verdict.tokens.append(ids[accepted])
            verdict.path.append(node := accepted)
        verdicts.append(verdict)
    return verdicts
