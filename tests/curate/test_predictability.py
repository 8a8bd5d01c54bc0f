"""AFLite: planted wrong and given-away labels, copies, order, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate.predictability import AFLite, content_keys, partitions


def cloud(n=120, gap=8.0, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return (rng.standard_normal((n, 5)) + gap * np.eye(3, 5)[y]).astype(np.float32), [str(k) for k in y]


@pytest.mark.parametrize("classifier", ["ridge", "logistic"])
def test_wrong_labels_are_unpredictable_and_the_rest_is(classifier):
    rows, labels = cloud(60)
    wrong = [3, 20, 46]
    for i in wrong:
        labels[i] = str((int(labels[i]) + 1) % 3)
    found = AFLite(partitions=16, train=0.5, classifier=classifier).score(rows, labels)
    assert (found[wrong] == 0).all()
    assert np.delete(found, wrong).min() == 1


def test_labels_without_a_trace_in_the_embedding_are_guessed():
    rng = np.random.default_rng(0)
    found = AFLite(partitions=40).score(rng.standard_normal((300, 4)), [str(k) for k in rng.integers(0, 2, 300)])
    assert 0.4 < np.nanmean(found) < 0.6


def test_a_row_is_never_predicted_from_its_copy():
    rows, labels = cloud(60, gap=0.0)
    rows[1], labels[1] = rows[0], labels[0]
    keys = content_keys(rows, np.arange(60) % 3, 0)
    assert keys[0] != keys[1]  # another label here
    keys = content_keys(rows, np.zeros(60, int), 0)
    assert keys[0] == keys[1]
    assert all(trained[0] == trained[1] for trained in partitions(keys, 50, 0.5))


def test_partitions_train_on_their_share_and_hold_every_row_out_equally_often():
    keys = content_keys(np.arange(200, dtype=np.float32)[:, None], np.zeros(200, int), 0)
    trained = np.array(list(partitions(keys, 400, 0.8)))
    assert (trained.sum(1) == 160).all()
    assert abs(trained.mean(0) - 0.8).max() < 5 * np.sqrt(0.16 / 400)
    assert len({t.tobytes() for t in trained}) == 400
    together = np.corrcoef(trained[:, :50].T)[np.triu_indices(50, 1)]
    assert abs(together).max() < 0.3


def test_the_order_of_rows_does_not_matter():
    rows, labels = cloud(gap=1.0)
    score = AFLite(partitions=16, train=0.5)
    whole = score.score(rows, labels)
    order = np.random.default_rng(1).permutation(len(rows))
    np.testing.assert_array_equal(score.score(rows[order], [labels[i] for i in order]), whole[order])
    assert whole.std() > 0.1


def test_rows_without_a_label_have_no_value_and_change_nothing():
    rows, labels = cloud(gap=1.0)
    more = np.concatenate([rows, 100 + rows[:5]])
    found = AFLite(partitions=8).score(more, [*labels, *[None] * 5])
    assert np.isnan(found[-5:]).all()
    np.testing.assert_array_equal(found[:-5], AFLite(partitions=8).score(rows, labels))


def test_equal_rows_are_all_held_out_or_missing_but_never_an_error():
    found = AFLite(partitions=4).score(np.ones((10, 3)), ["a", "b"] * 5)
    assert ((found >= 0) & (found <= 1) | np.isnan(found)).all()


def test_half_precision_rows_are_taken():
    rows, labels = cloud()
    assert np.nanmean(AFLite(partitions=4).score(rows.astype(np.float16), labels)) == 1


@pytest.mark.parametrize(
    ("rows", "labels", "match"),
    [
        (np.ones((3, 2)), ["a", "b"], "must be"),
        (np.ones(3), ["a", "b", "a"], "must be"),
        (np.full((6, 2), np.nan), ["a", "b"] * 3, "not finite"),
        (np.ones((6, 2)), ["a"] * 6, "at least 4 rows and 2"),
        (np.ones((3, 2)), ["a", "b", "a"], "at least 4 rows and 2"),
        (np.ones((0, 2)), [], "at least 4 rows and 2"),
    ],
)
def test_what_cannot_be_scored_is_refused(rows, labels, match):
    with pytest.raises(ValueError, match=match):
        AFLite().score(rows, labels)
