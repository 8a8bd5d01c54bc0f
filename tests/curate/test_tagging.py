"""Keyword tags against sklearn's tf-idf."""

from __future__ import annotations

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

from residency.curate.tagging import keywords

TEXTS = [
    "what are the symptoms of cystic fibrosis and of asthma",
    "what are the treatments of asthma",
    "what are the causes of gout gout gout",
    "what are of the",
    "",
]


def test_keywords_are_the_words_with_the_highest_tf_idf():
    counter = CountVectorizer(token_pattern=r"\S+")
    counts = counter.fit_transform(TEXTS).toarray()
    idf = TfidfTransformer(smooth_idf=False).fit(counts).idf_ - 1
    names = counter.get_feature_names_out()
    found = keywords(TEXTS, 3)
    for mine, weight in zip(found, counts * idf, strict=True):
        best = np.sort(weight[weight > 1e-12])[::-1][:3]
        np.testing.assert_allclose([weight[list(names).index(w)] for w in mine], best)
    assert found[2][0] == "gout"
    assert found[4] == ()


def test_a_word_of_every_text_is_no_tag():
    assert keywords(["how so", "how then"], 5) == [("so",), ("then",)]
    assert keywords([]) == []
