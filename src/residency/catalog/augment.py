"""More rows out of those there are: methods of the stage `curate`."""

from __future__ import annotations

from residency.catalog.rows import Method

METHODS: tuple[Method, ...] = (
    Method(
        name="span-replace",
        stage="curate",
        role="Augmenter",
        title="Data Augmentation for Copy-Mechanism in Dialogue State Tracking",
        arxiv="2002.09634",
        reference="Song, Zang, Su, Wu, Han & Hu, 2020 (reconstructed from its abstract)",
        object="residency.curate.spans:SpanReplace",
        step="residency augment FILE OUT",
        pain="My slot filler misses the values it has not seen in training",
    ),
)
