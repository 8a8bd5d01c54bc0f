"""Scores of single rows: statistics, what a language model or a judge says of them: methods of the stage `curate`."""

from __future__ import annotations

from residency.catalog.rows import Method

METHODS: tuple[Method, ...] = ()
