"""Scores of rows by what they do for a target: likelihood ratios, gradients, values: methods of the stage `curate`."""

from __future__ import annotations

from residency.catalog.rows import Method

METHODS: tuple[Method, ...] = ()
