"""Verification keeps the target's distribution: closed forms, transformers' own rule, and exact joint distributions."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from transformers.generation.utils import _speculative_sampling

from residency.infer import verify
from residency.infer.tree import Tree


def tree(tokens, parents, drawn_from=()):
    depth = [0]
    for parent in parents[1:]:
        depth.append(depth[parent] + 1)
    row = torch.tensor([tokens])
    return Tree(
        row, torch.tensor([parents]), torch.tensor([depth]), torch.ones_like(row, dtype=torch.bool), tuple(drawn_from)
    )


def test_greedy_follows_the_argmax_and_adds_one():
    #        0
    #      1   2        node 1 says 5, node 2 says 6
    #     3 4           below 1: 7 and 8
    given = tree([9, 5, 6, 7, 8], [-1, 0, 0, 1, 1])
    logits = torch.zeros(1, 5, 10)
    for node, token in enumerate((5, 8, 1, 2, 3)):
        logits[0, node, token] = 1.0
    (verdict,) = verify.greedy(given, logits)
    assert verdict.path == [0, 1, 4]
    assert verdict.tokens == [5, 8, 3]
    logits[0, 0, 2] = 2.0
    (verdict,) = verify.greedy(given, logits)
    assert (verdict.path, verdict.tokens) == ([0], [2])


def test_dead_nodes_are_never_accepted():
    given = tree([9, 5], [-1, 0])
    dead = Tree(given.tokens, given.parents, given.depth, torch.tensor([[True, False]]))
    logits = torch.zeros(1, 2, 10)
    logits[0, 0, 5] = 1.0
    assert verify.greedy(dead, logits)[0].path == [0]


def test_processors_see_the_way_to_each_node():
    seen = []

    def process(row, way, logits):
        seen.append((row, list(way)))
        return logits

    logits = torch.zeros(1, 3, 10)
    logits[0, 0, 5] = logits[0, 1, 6] = logits[0, 2, 7] = 1.0
    verify.greedy(tree([9, 5, 6], [-1, 0, 1]), logits, process)
    assert seen == [(0, []), (0, [5]), (0, [5, 6])]


def test_drawn_trees_are_needed_for_rejection():
    with pytest.raises(ValueError, match="use `matching`"):
        verify.rejection(tree([1, 2], [-1, 0]), torch.zeros(1, 2, 4))


def test_a_chain_is_judged_as_transformers_judges_it():
    """The same uniforms lead to the same number of accepted tokens (Leviathan's algorithm 1)."""
    V, N = 7, 4
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        p_logits = 1.5 * torch.randn(1, N + 1, V, generator=generator)
        q_logits = 1.5 * torch.randn(1, N, V, generator=generator)
        q = q_logits.softmax(-1)
        drawn = torch.cat([torch.multinomial(q[0, i], 1, generator=generator) for i in range(N)])
        torch.manual_seed(case)
        _, theirs = _speculative_sampling(torch.cat((torch.tensor([0]), drawn))[None], q_logits, N, p_logits)
        torch.manual_seed(case)
        uniforms = torch.rand(1, N)  # what transformers draws first, all at once
        given = tree(
            [0, *drawn.tolist()],
            list(range(-1, N)),
            drawn_from=[(q[:, i : i + 1].log(), torch.tensor([[i]])) for i in range(N)],
        )
        it = iter(uniforms[0].tolist())
        original = torch.rand

        def fixed(*shape, it=it, original=original):
            return torch.tensor(next(it)) if shape == ((),) else original(*shape)

        torch.rand = fixed
        try:
            (mine,) = verify.rejection(given, p_logits)
        finally:
            torch.rand = original
        assert len(mine.path) - 1 == int(theirs)


@pytest.mark.parametrize("rule", ["matching", "rejection"])
def test_what_comes_out_has_the_targets_distribution(rule):
    """Two tokens deep with siblings: the joint distribution of the first two tokens, by χ² over 16 cells."""
    torch.manual_seed(0)
    V, draws = 4, 6_000
    p1, p2 = (0.7 * torch.randn(V)).softmax(-1), (0.7 * torch.randn(V, V)).softmax(-1)
    q1, q2 = (1.2 * torch.randn(V)).softmax(-1), (1.2 * torch.randn(V, V)).softmax(-1)
    counts = torch.zeros(V, V)
    for _ in range(draws):
        first = torch.multinomial(q1, 2)  # two siblings, without replacement
        second = torch.multinomial(q2[first[0]], 2)  # below the first of them
        tokens = [0, *first.tolist(), *second.tolist()]
        given = tree(
            tokens,
            [-1, 0, 0, 1, 1],
            drawn_from=[
                (q1.log()[None, None], torch.tensor([[0]])),
                (q2[first[0]].log()[None, None], torch.tensor([[1]])),
            ],
        )
        logits = torch.stack([p1, *(p2[t] for t in first), torch.ones(V), torch.ones(V)]).log()[None]
        (verdict,) = getattr(verify, rule)(given, logits)
        said = verdict.tokens
        if len(said) == 1:  # the second token is drawn at the next step, from the target
            said = [said[0], int(torch.multinomial(p2[said[0]], 1))]
        counts[said[0], said[1]] += 1
    expected = draws * p1[:, None] * p2
    assert expected.min() > 5
    assert chisquare(counts.flatten(), expected.flatten()).pvalue > 1e-3


def test_rejection_accepts_everything_when_draft_and_target_agree():
    torch.manual_seed(1)
    p = (2 * torch.randn(6)).softmax(-1)
    for _ in range(50):
        first = int(torch.multinomial(p, 1))
        given = tree([0, first], [-1, 0], drawn_from=[(p.log()[None, None], torch.tensor([[0]]))])
        (verdict,) = verify.rejection(given, p.log().expand(1, 2, -1))
        assert verdict.path == [0, 1]


def test_a_draft_vocabulary_is_a_subset():
    """The drafter knows tokens 2 and 5 of 6; the rest comes from the target alone."""
    torch.manual_seed(2)
    p, q, ids = (torch.randn(6)).softmax(-1), torch.tensor([0.7, 0.3]), torch.tensor([2, 5])
    counts = torch.zeros(6)
    for _ in range(6000):
        token = int(ids[torch.multinomial(q, 1)])
        given = tree([0, token], [-1, 0], drawn_from=[(q.log()[None, None], torch.tensor([[0]]))])
        (verdict,) = verify.rejection(given, p.log().expand(1, 2, -1), vocabulary=ids)
        counts[verdict.tokens[0]] += 1
    assert chisquare(counts, 6000 * p).pvalue > 1e-3


def test_a_drafter_that_is_all_but_certain_distorts_nothing():
    """At a low temperature all but the first probability underflow; the second and third draw still count."""
    torch.manual_seed(3)
    logq = (torch.tensor([12.0, 0.0, -1.0, -2.0]) / 0.1).log_softmax(-1)
    counts = torch.zeros(4)
    for _ in range(2000):
        gumbel = logq - torch.empty(4).exponential_().log()
        order = gumbel.argsort(descending=True)[:3].tolist()
        given = tree([9, *order], [-1, 0, 0, 0], drawn_from=[(logq[None, None], torch.tensor([[0]]))])
        (verdict,) = verify.rejection(given, torch.zeros(1, 4, 4))
        counts[verdict.tokens[0]] += 1
    assert chisquare(counts, torch.full((4,), 500.0)).pvalue > 1e-3
