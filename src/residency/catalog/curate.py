"""Choosing, weighing and growing the rows: the methods and recipe steps of the stage `curate`."""

from __future__ import annotations

from residency.catalog.rows import Method, StepRow

METHODS: tuple[Method, ...] = ()

STEPS: tuple[StepRow, ...] = (
    StepRow(
        "curate", "residency.curate.steps:CurateByKShot", "by", "k-shot", "let the trusted rows choose from a pool"
    ),
    StepRow("curate", "residency.curate.steps:CurateByFilter", "by", "filter", "keep the rows that meet a condition"),
)
