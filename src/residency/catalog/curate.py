"""Choosing, weighing and growing the rows: the methods and recipe steps of the stage `curate`."""

from __future__ import annotations

from residency.catalog.rows import Method, StepRow

METHODS: tuple[Method, ...] = (
    Method(
        name="inscl",
        stage="curate",
        role="Selector",
        title="InsCL: A Data-efficient Continual Learning Paradigm for Fine-tuning Large Language Models with "
        "Instructions",
        arxiv="2403.11435",
        reference="Wang, Liu, Shi et al., NAACL 2024",
        object="residency.curate.replay:Replay",
        step="replay: {next: …}",
        pain="My model learns one task after another, and forgets the first",
        extras=("transport",),
    ),
    Method(
        name="relative-gain",
        stage="evaluate",
        role="Diagnostic",
        title="InsCL: A Data-efficient Continual Learning Paradigm for Fine-tuning Large Language Models with "
        "Instructions",
        arxiv="2403.11435",
        reference="Wang, Liu, Shi et al., NAACL 2024 (its measure, after Scialom et al. 2022)",
        object="residency.evaluate.relative_gain:relative_gain",
        step="the report of recipes with `replay`",
        pain="I want to know how much of the earlier tasks is left",
    ),
)

STEPS: tuple[StepRow, ...] = (
    StepRow(
        "curate", "residency.curate.steps:CurateByKShot", "by", "k-shot", "let the trusted rows choose from a pool"
    ),
    StepRow("curate", "residency.curate.steps:CurateByFilter", "by", "filter", "keep the rows that meet a condition"),
    StepRow(
        "replay", "residency.curate.step_replay:ReplayStep", summary="the next task's rows, and some of those before"
    ),
)
