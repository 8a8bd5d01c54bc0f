"""InsCL's replay against its equations, sklearn's IDF, POT's transport, and what must hold of any quota."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfTransformer

from residency.curate.replay import Replay, insinfo, quotas


def problem(seed=0, sizes=(12, 30, 9), copies=3):
    """Tasks of instructions with some copies each; the first task is like the new one."""
    rng = np.random.default_rng(seed)
    centres = {"a": [3, 0, 0, 0], "b": [0, 3, 0, 0], "c": [0, 0, 3, 0], "new": [3, 0, 0, 0.5]}
    rows = []
    for task, size in zip(["a", "b", "c", "new"], [*sizes, 10], strict=True):
        for k in range(math.ceil(size / copies)):
            vector = np.array(centres[task]) + 0.5 * rng.standard_normal(4)
            tags = tuple(sorted(set(rng.choice([f"{task}{i}" for i in range(6)] + ["all"], 3))))
            rows += [(task, f"{task} {k}", vector, tags)] * min(copies, size - k * copies)
    old = [r for r in rows if r[0] != "new"]
    new = [r for r in rows if r[0] == "new"]
    tasks, instructions, vectors, tags = (list(c) for c in zip(*old, strict=True))
    _, new_i, new_v, new_t = (list(c) for c in zip(*new, strict=True))
    return tasks, instructions, np.array(vectors), tags, new_i, np.array(new_v), new_t


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(0, 12)), min_size=1, max_size=6),
    st.integers(1, 9),
)
def test_quotas_sum_exactly_and_never_exceed_a_task(tasks, per_task):
    w, sizes = zip(*tasks, strict=True)
    found = quotas(w, per_task, sizes)
    assert sum(found) == min(per_task * len(w), sum(sizes))
    assert all(0 <= q <= n for q, n in zip(found, sizes, strict=True))
    for q, n, d in zip(found, sizes, w, strict=True):
        for q2, n2, d2 in zip(found, sizes, w, strict=True):
            if d > d2 and q < n:
                assert q >= q2 or q2 == n2, "the less alike task got fewer rows"
            if d == d2 and q < n and q2 < n2:
                assert abs(q - q2) <= 1


def test_quotas_are_the_published_rule_where_nothing_is_full():
    w = [0.31, 0.12, 0.77, 0.3]
    exact = [4 * 10 * x / sum(w) for x in w]
    expected = [math.floor(x) for x in exact]
    for j in sorted(range(4), key=lambda j: -w[j])[: 40 - sum(expected)]:
        expected[j] += 1
    assert quotas(w, 10, [1000] * 4) == expected
    assert quotas([0.0, 0.0, 0.0], 4, [50] * 3) == [4, 4, 4]
    assert quotas([0.0, 1.0], 5, [50, 3]) == [7, 3]


def test_insinfo_is_the_sum_of_idf():
    _, instructions, _, tags, *_ = problem()
    found = insinfo(instructions, tags)
    own = dict(zip(instructions, tags, strict=True))
    names = sorted({t for its in own.values() for t in its})
    table = np.array([[t in its for t in names] for its in own.values()], float)
    idf = TfidfTransformer(smooth_idf=False).fit(table).idf_ - 1
    expected = dict(zip(own, table @ idf, strict=True))
    np.testing.assert_allclose(found, [expected[i] for i in instructions])
    everywhere = [(*its, "everywhere") for its in tags]
    np.testing.assert_allclose(insinfo(instructions, everywhere), found)
    once = [(*its, "once") if i == instructions[0] else its for i, its in zip(instructions, tags, strict=True)]
    assert insinfo(instructions, once)[0] - found[0] == pytest.approx(math.log(len(own)))


@pytest.mark.parametrize("weights", ["frequency", "uniform"])
def test_distances_are_pots_and_more_is_replayed_of_what_is_less_alike(weights):
    inputs = problem()
    tasks, instructions, vectors, _, new_i, new_v, _ = inputs
    found = Replay(per_task=5, weights=weights).select(*inputs)
    for task in "abc":
        mine = [i for i, t in enumerate(tasks) if t == task]

        def side(names, rows):
            first = dict(zip(reversed(names), rows[::-1], strict=True))
            counts = Counter(names)
            w = np.array([counts[n] if weights == "frequency" else 1.0 for n in first])
            return np.array(list(first.values())), w / w.sum()

        x, a = side([instructions[i] for i in mine], vectors[mine])
        y, b = side(new_i, new_v)
        cost = ot.dist(x, y, metric="cosine")
        assert found.distances[task] == pytest.approx(ot.emd2(a, b, cost), abs=1e-9)
    assert found.quotas["a"] < found.quotas["b"]
    assert sum(found.quotas.values()) == 15 == len(found.indices)
    assert Counter(tasks[i] for i in found.indices) == Counter(found.quotas)
    sinkhorn = Replay(per_task=5, weights=weights, solver="sinkhorn").select(*inputs)
    assert sinkhorn.distances["b"] == pytest.approx(found.distances["b"], abs=0.03)


@pytest.mark.parametrize("per_task", [2, 4, 8, 12, 500])
def test_the_sampler_takes_the_most_informative_first_and_leaves_no_instruction_out(per_task):
    inputs = problem()
    tasks, instructions = inputs[:2]
    found = Replay(per_task=per_task, quota="equal").select(*inputs)
    assert len(set(found.indices.tolist())) == len(found.indices)
    for task, m in found.quotas.items():
        mine = [i for i, t in enumerate(tasks) if t == task]
        taken = [i for i in found.indices.tolist() if tasks[i] == task]
        assert len(taken) == m
        kinds = list(dict.fromkeys(instructions[i] for i in mine))
        there = {instructions[i] for i in taken}
        if m >= len(kinds):
            assert there == set(kinds)
        else:
            info = {instructions[i]: found.score[i] for i in mine}
            assert min(info[k] for k in there) >= max(info[k] for k in kinds if k not in there) - 1e-12
            assert len(there) == m


def test_random_rows_follow_the_seed_and_each_task_its_own_stream():
    inputs = problem()
    a, b, c = (Replay(per_task=4, quota="equal", rows="random", seed=s).select(*inputs) for s in (0, 0, 1))
    assert a.indices.tolist() == b.indices.tolist() != c.indices.tolist()
    tasks, instructions, vectors, tags, *new = inputs
    first = [i for i, t in enumerate(tasks) if t == "a"]
    alone = Replay(per_task=4, quota="equal", rows="random").select(
        ["a"] * len(first), [instructions[i] for i in first], vectors[first], [tags[i] for i in first], *new
    )
    assert alone.indices.tolist() == [i for i in a.indices.tolist() if tasks[i] == "a"]


def test_tasks_equal_to_the_new_one_and_tags_that_say_nothing():
    tasks, instructions, vectors, _, *_ = problem()
    same = np.tile([1.0, 0, 0, 0], (len(tasks), 1))
    tags = [("all",)] * len(tasks)
    found = Replay(per_task=4).select(tasks, instructions, same, tags, ["n"], same[:1], [("all",)])
    assert sorted(found.quotas.values()) == [4, 4, 4]
    assert not found.score.any()
    assert len(Replay().select([], [], np.empty((0, 4)), [], ["n"], vectors[:1], [()]).indices) == 0


def test_what_does_not_fit_is_refused():
    tasks, instructions, vectors, tags, *new = problem()
    with pytest.raises(ValueError, match="every task"):
        Replay().select(tasks[:-1], instructions, vectors, tags, *new)
    with pytest.raises(ValueError, match="no rows"):
        Replay().select(tasks, instructions, vectors, tags, [], np.empty((0, 4)), [])
    vectors[3] = 0
    with pytest.raises(ValueError, match="no cosine"):
        Replay().select(tasks, instructions, vectors, tags, *new)


def test_equals_are_drawn_by_lot_and_not_by_their_place():
    names = [f"q{i}" for i in range(40)]
    vectors = np.ones((40, 2))
    tags = [(f"only {i}",) for i in range(40)]

    def taken(order, seed):
        found = Replay(per_task=6, seed=seed).select(
            ["a"] * 40, [names[i] for i in order], vectors, [tags[i] for i in order], ["n"], vectors[:1], [("n",)]
        )
        return {order[i] for i in found.indices.tolist()}

    forward = taken(list(range(40)), 0)
    assert forward == taken(list(range(39, -1, -1)), 0)
    assert forward != taken(list(range(40)), 1)
    assert forward != set(range(6))
