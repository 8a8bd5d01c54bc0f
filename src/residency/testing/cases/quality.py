"""Cases of the curate stage: scores of single rows: statistics, what a language model or a judge says of them."""

from __future__ import annotations
