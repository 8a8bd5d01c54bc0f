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

_CHOICES = {
    "k-shot": "let the trusted rows choose from a pool",
    "filter": "keep the rows that meet a condition",
    "top": "the highest by a score",
    "sample": "at random, likelier where a score is high",
    "random": "at random",
    "k-centre": "rows that leave no row far away",
    "herding": "rows whose mean is the pool's",
    "facility-location": "rows that stand for all others",
    "qdit": "rows that stand for all others, and are good",
    "dpp": "rows that are good and unlike each other",
    "deita": "the best first, unless too like one taken",
    "instag": "rows that cover all tags, the richest first",
    "quotas": "a mixture: so much of every tag",
    "cluster-clip": "evenly over clusters",
    "minhash": "one of each group of near-duplicate texts",
    "semdedup": "one of each group of near-duplicate meanings",
    "d4": "without near-duplicates and without the most typical",
    "gradient-matching": "rows whose gradients add up to the target's",
}


def _step_class(name: str) -> str:
    return "CurateBy" + "".join(part.capitalize() for part in name.split("-"))


STEPS: tuple[StepRow, ...] = (
    *(
        StepRow("curate", f"residency.curate.steps:{_step_class(name)}", "by", name, summary)
        for name, summary in _CHOICES.items()
    ),
    StepRow(
        "replay", "residency.curate.step_replay:ReplayStep", summary="the next task's rows, and some of those before"
    ),
)
