"""Cases of the curate stage: scores of rows by what they do for a target: likelihood ratios, gradients, values."""

from __future__ import annotations
