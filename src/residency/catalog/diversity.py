"""How many different words, how far apart the rows are: methods of the stage `curate`."""

from __future__ import annotations

from residency.catalog.rows import Method

METHODS: tuple[Method, ...] = ()
