"""Cases of the curate stage: how many different words, how far apart the rows are."""

from __future__ import annotations
