"""Choosing rows under a budget: methods of the stage `curate`."""

from __future__ import annotations

from residency.catalog.rows import Method

METHODS: tuple[Method, ...] = (
    Method(
        name="k-shot",
        stage="curate",
        role="Selector",
        title="Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models",
        arxiv="2408.15915",
        reference="Yang, Qin, Wu et al., 2024 (its data step, Sim-Div)",
        object="residency.curate.simdiv:SimDiv",
        step="curate: {by: k-shot}",
        pain="I have a few good rows and a large mixed pool",
    ),
)
