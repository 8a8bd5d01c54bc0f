"""What a draft brings: rates by hand, figures from made-up counts, and the clock."""

from __future__ import annotations

import pytest
import torch
from models import tiny

from residency import measure
from residency.infer.draftcost import Comparison, accepted, compare, head_ms
from residency.infer.draftstats import DraftStats
from residency.infer.medusa import Medusa
from residency.infer.tree import DynamicTree, Tree
from residency.infer.verify import Verdict
from residency.progress import Progress


def made(tokens, steps, draft=0.0, verify=1.0, other=0.0):
    return DraftStats(
        steps=steps, tokens=tokens, rows=steps, nodes=3 * steps, prompt_seconds=9.0, draft_seconds=draft,
        verify_seconds=verify, other_seconds=other,
    )  # fmt: skip


def test_rates_by_hand():
    stats = {"plain": made(20, 20), "medusa": made(20, 10, draft=0.1, verify=0.25, other=0.15)}
    found = Comparison(
        "medusa", stats, {"plain": 10.0, "medusa": 9.5}, 2, 3, {"draft vocabulary": 0.1, "all tokens": 4}
    )
    record = found.measured()
    assert record["decode_tokens_per_second"] == {"plain": 20.0, "medusa": 40.0}  # prompts do not count
    assert record["same_answers"] == "2 of 3"
    (table,) = record["figures"]
    assert table["rows"] == [["plain", 1.0, 3.0, 50.0, 0.0, 20.0, 1.0], ["medusa", 2.0, 3.0, 50.0, 10.0, 40.0, 2.0]]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_counts_of_a_step_and_their_figures():
    """Two rows: one takes two guesses of three levels, one has ended before."""
    tree = Tree(
        torch.tensor([[9, 5, 6, 7]] * 2), torch.tensor([[-1, 0, 1, 2]] * 2), torch.tensor([[0, 1, 2, 3]] * 2),
        torch.ones(2, 4, dtype=torch.bool),
    )  # fmt: skip
    stats = DraftStats()
    for path in ([0, 1, 2], [0]):
        stats.count(tree, [Verdict(path, [1] * len(path)), Verdict([0, 1], [1, 1])], [False, True])
    assert (stats.steps, stats.rows, stats.nodes) == (2, 2, 8)
    assert stats.lengths == {2: 1, 0: 1}
    assert stats.offered == {1: 2, 2: 2, 3: 2}
    assert stats.accepted == {1: 1, 2: 1, 3: 0}
    bars, lines = accepted(stats)
    assert bars["y"] == [0.5, 0.0, 0.5, 0.0]
    assert [series["y"] for series in lines["series"]] == [[0.5, 0.5, 0.0], [0.5, 1.0, 0.0]]
    assert len(accepted(DraftStats())) == 1  # nothing was drafted: no positions to draw
    twice = DraftStats()
    twice.add(stats)
    twice.add(stats)
    assert twice.lengths == {2: 2, 0: 2}
    assert twice.decode_seconds == 0


@pytest.mark.parametrize("lookup", [True, False])
def test_decoders_are_compared_on_the_same_questions(lookup):
    model = tiny()
    drafter = Medusa(model, token_ids=torch.arange(40))
    settings = {"name": "medusa", "lookup": lookup, "new_tokens": 12, "ends": []}
    found = compare(model, drafter, DynamicTree(4), [[5, 9, 33], [7, 41]], **settings, progress=Progress())
    assert list(found.stats) == ["plain", "medusa"] + ["lookup alone", "both"] * lookup
    assert found.chosen == ("both" if lookup else "medusa")
    assert found.found is found.stats[found.chosen]
    assert (found.same, found.questions) == (2, 2)
    assert all(stats.tokens == 22 for stats in found.stats.values())  # the first of 12 comes with the prompt
    assert found.stats["plain"].nodes == found.stats["plain"].steps == 22
    assert all("forward" not in layer.__dict__ for layer in model.modules())  # unpacked again
    assert set(head_ms(model, drafter)) == {"draft vocabulary", "all tokens"}


def test_the_clock_waits_for_a_device_other_than_the_cpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    before = measure.now(torch.device("cpu"))
    assert waited == []
    assert measure.now(torch.device("cuda", 1)) >= before
    assert waited == [torch.device("cuda", 1)]
