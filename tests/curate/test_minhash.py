"""MinHash near-duplicates against exact Jaccard over all pairs."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.curate import minhash
from residency.curate.minhash import MinHash


def shingles(text, n, unit="words"):
    units = text.lower().split() if unit == "words" else " ".join(text.lower().split())
    return {tuple(units[i : i + n]) for i in range(max(len(units) - n + 1, 1))} if units else set()


def jaccard(a, b):
    return len(a & b) / len(a | b) if a | b else 0.0


def corpus(n=120, seed=0, length=60):
    """Random texts; half of them are copies of earlier ones with a few words changed."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(n):
        words = [f"w{x}" for x in rng.integers(0, 300, length)]
        if i % 2:
            words = texts[rng.integers(0, i)].split()
            for place in rng.integers(0, length, rng.integers(0, 5)):
                words[place] = f"x{rng.integers(0, 300)}"
        texts.append(" ".join(words))
    return texts


def components(texts, threshold, n=5, unit="words"):
    sets = [shingles(t, n, unit) for t in texts]
    root = list(range(len(texts)))
    for a, b in combinations(range(len(texts)), 2):
        if jaccard(sets[a], sets[b]) >= threshold and root[a] != root[b]:
            old, new = max(root[a], root[b]), min(root[a], root[b])
            root = [new if r == old else r for r in root]
    return root


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdé漢"), max_size=12), max_size=6), st.integers(1, 4), st.booleans())
def test_shingle_sets_have_the_sizes_and_overlaps_of_sets(rows, n, words):
    texts = [(" " if words else "").join(row) for row in rows]
    unit = "words" if words else "characters"
    hashes, bounds = MinHash(shingle=n, unit=unit).shingles(texts)
    mine = [set(hashes[a:b].tolist()) for a, b in pairwise(bounds)]
    sets = [shingles(t, n, unit) for t in texts]
    assert [len(s) for s in mine] == [len(s) for s in sets] == np.diff(bounds).tolist()
    for a, b in combinations(range(len(texts)), 2):
        assert len(mine[a] & mine[b]) == len(sets[a] & sets[b])
        if sets[a] and sets[b]:
            assert minhash._jaccard(hashes, bounds, a, b) == jaccard(sets[a], sets[b])


@pytest.mark.parametrize("j", [0.1, 0.5, 0.8, 0.95])
def test_the_estimate_is_unbiased_with_the_stated_deviation(j):
    shared = round(200 * j / (1 + j))
    universe = np.random.default_rng(7).integers(0, 1 << 63, (300, 200 - shared), dtype=np.uint64)
    errors = []
    for seed, names in enumerate(universe):
        a, b = np.sort(names[:100]), np.sort(np.concatenate([names[:shared], names[100:]]))
        signature = MinHash(seed=seed).signatures(np.concatenate([a, b]), np.array([0, 100, 200]))
        errors.append((signature[0] == signature[1]).mean() - shared / (200 - shared))
    exact = shared / (200 - shared)
    deviation = np.sqrt(exact * (1 - exact) / 128)
    assert abs(np.mean(errors)) < 4 * deviation / np.sqrt(300)
    assert 0.85 < np.std(errors) / deviation < 1.15
    assert np.abs(errors).max() < 5 * deviation


@pytest.mark.parametrize("params", [{}, {"shingle": 3, "threshold": 0.6}, {"unit": "characters", "shingle": 9}])
def test_groups_are_the_components_of_the_exact_graph(params):
    texts = corpus()
    method = MinHash(recall=0.9999, **params)
    found = method.select(texts)
    expected = components(texts, method.threshold, method.shingle, method.unit)
    firsts = {r: i for i, r in enumerate(dict.fromkeys(r for r in expected if expected.count(r) > 1))}
    assert found.group.tolist() == [firsts.get(r, -1) for r in expected]
    assert found.indices.tolist() == sorted(set(expected))
    assert found.nearest.tolist() == expected
    assert 5 < len(firsts) < len(found.indices) < len(texts)
    for i, reason in enumerate(found.reasons):
        exact = jaccard(*(shingles(texts[k], method.shingle, method.unit) for k in (i, int(found.nearest[i]))))
        assert found.score[i] == pytest.approx(exact)
        assert reason.startswith("kept" if i in found.indices else "dropped")
        assert ("by way of others" in reason) == (exact < method.threshold)
        if i not in found.indices:
            assert reason.endswith(f"of row {expected[i] + 1}")


def test_pairs_at_the_threshold_meet_as_often_as_promised():
    rng = np.random.default_rng(3)
    base = [[f"w{x}" for x in rng.integers(0, 10**6, 90)] for _ in range(600)]
    # 90 single words, 10 of them others: J = 80 / 100
    texts = [" ".join(w) for w in base] + [
        " ".join([*w[10:], *(f"y{i}{k}" for k in range(10))]) for i, w in enumerate(base)
    ]
    for recall in (0.5, 0.95):
        method = MinHash(shingle=1, threshold=0.8, recall=recall)
        bands, width = method.bands
        promised = 1 - (1 - 0.8**width) ** bands
        assert promised >= recall > 1 - (1 - 0.8 ** (width + 1)) ** (128 // (width + 1))
        found = method.select(texts)
        together = np.mean([found.nearest[600 + i] == i for i in range(600)])
        assert abs(together - promised) < 4 * np.sqrt(promised * (1 - promised) / 600) + 0.01


def test_rows_of_one_bucket_that_are_not_like_the_first_find_each_other(monkeypatch):
    texts = [f"a{i % 5} b{i % 5} c{i % 5} d{i % 5} e{i % 5} f{i % 5}" for i in range(20)]
    monkeypatch.setattr(MinHash, "signatures", lambda self, h, b: np.zeros((20, self.permutations), np.uint32))
    assert MinHash().select(texts).nearest.tolist() == [i % 5 for i in range(20)]


def test_estimates_group_almost_like_exact_sets():
    texts = corpus(400, 5)
    exact, estimate = MinHash(recall=0.999).select(texts), MinHash(recall=0.999, verify="estimate").select(texts)
    same = np.mean(exact.nearest == estimate.nearest)
    assert 0.8 < same < 1


def test_the_preferred_row_stands_for_its_group():
    texts = ["one two three four five six", "ONE two  three, four five six!", "another text altogether here it is"] * 2
    found = MinHash().select(texts, prefer=[0, 3, 1, 3, 2, 1])
    assert found.indices.tolist() == [1, 2]
    assert found.nearest.tolist() == [1, 1, 2, 1, 1, 2]
    assert found.group.tolist() == [0, 0, 1, 0, 0, 1]
    assert found.reasons[1] == "kept: stands for 3 near-duplicates"
    assert found.reasons[5] == "dropped: near-duplicate (Jaccard 1.00) of row 3"


def test_short_empty_and_odd_texts():
    found = MinHash().select(["", "a", "A", "  ", "b c", "5 mg", "50 mg", "\udc80 x"])
    assert found.indices.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert found.group.tolist() == [-1, 0, 0, -1, -1, -1, -1, -1]
    assert MinHash().select([]).indices.tolist() == []
    assert MinHash().select(["", ""]).indices.tolist() == [0, 1]
    assert MinHash(threshold=1.0).select(["a b", "b a", "a b"]).indices.tolist() == [0, 1]
    for bad in (lambda: MinHash().select("text"), lambda: MinHash().select(["a"], prefer=[1, 2])):
        with pytest.raises(ValueError, match=r"one text|finite"):
            bad()
    with pytest.raises(ValueError, match="finite"):
        MinHash().select(["a"], prefer=[float("nan")])


def test_signatures_do_not_depend_on_process_place_or_block(monkeypatch):
    texts = corpus(30)
    code = (
        "from residency.curate.minhash import MinHash; m = MinHash(permutations=16)\n"
        f"print(m.signatures(*m.shingles([{texts[4]!r}]))[0].tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    method = MinHash(permutations=16)
    assert str(method.signatures(*method.shingles(texts))[4].tolist()) == other.strip()
    whole = method.signatures(*method.shingles(texts))
    monkeypatch.setattr(minhash, "BLOCK", 70)
    np.testing.assert_array_equal(method.signatures(*method.shingles(texts)), whole)
    assert (MinHash(permutations=16, seed=1).signatures(*method.shingles(texts)) != whole).all()


@pytest.mark.parametrize("kind", ["copies", "one bucket of strangers"])
def test_no_quadratic_step(kind, monkeypatch):
    n = 6000
    if kind == "copies":
        texts = ["the same answer to every question"] * n
    else:  # nothing is alike, and everything meets: all signatures are made equal
        texts = [f"a{i} b{i} c{i} d{i} e{i}" for i in range(n)]
        monkeypatch.setattr(MinHash, "signatures", lambda self, h, b: np.zeros((n, self.permutations), np.uint32))
    compared = []
    count = minhash._jaccard
    monkeypatch.setattr(minhash, "_jaccard", lambda *a: compared.append(1) or count(*a))
    method = MinHash(permutations=8, recall=0.5)
    begun = time.process_time()
    found = method.select(texts)
    assert len(found.indices) == (1 if kind == "copies" else n)
    assert len(compared) <= n * (2 if kind == "copies" else method.bands[0] * minhash.LEADERS)
    assert time.process_time() - begun < 10
