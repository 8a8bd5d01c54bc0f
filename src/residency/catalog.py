"""The map of the house: every method and every recipe step, by name. Nothing is imported until it is asked for.

A method row says what it is (name, stage, role, paper), where it lives (`object`), how a recipe reaches it
(`step`), how mature it is and what it needs. A step row ties a recipe key (and its variant, such as `tune: {method:
probe}`) to its class.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, Literal

from residency.errors import MissingError, ResidencyError

Stage = Literal["curate", "adapt", "compress", "infer", "evaluate", "federate"]
Role = Literal[
    "Scorer", "Selector", "Augmenter", "Objective", "Surgery", "Decoder", "Panel", "Metric", "Strategy", "Predictor"
]


@dataclass(frozen=True)
class Method:
    """One row of the catalogue.

    Args:
        name: What recipes and the command line call it.
        stage: Which folder of the house it lives in.
        role: Which idiom it speaks (DESIGN: Scorer, Selector, Objective, …).
        title: Title of the paper, or of the standard work for a classic.
        arxiv: arXiv id, or None when there is none (then `reference` says where it is published).
        reference: Authors, venue, year.
        object: `module:attribute` of the class or function.
        step: How a recipe reaches it.
        pain: The user's sentence this method answers.
        status: "stable" passes the whole common suite; "experimental" names what it fails.
        extras: Extras of this package it needs.
    """

    name: str
    stage: Stage
    role: Role
    title: str
    arxiv: str | None
    reference: str
    object: str
    step: str
    pain: str
    status: Literal["stable", "experimental"] = "stable"
    extras: tuple[str, ...] = ()

    def load(self) -> Any:
        """Import and return the method's class or function."""
        return load(self.object, self.extras)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self) | {"extras": list(self.extras)}


@dataclass(frozen=True)
class StepRow:
    """One recipe step: `name`, or `name` with `{selector: variant}`; the first row of a name is its default."""

    name: str
    object: str
    selector: str | None = None
    variant: str | None = None
    summary: str = ""


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
    Method(
        name="lora",
        stage="adapt",
        role="Surgery",
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv="2106.09685",
        reference="Hu, Shen, Wallis et al., ICLR 2022 (through PEFT)",
        object="residency.lora:Lora",
        step="tune: {method: lora}",
        pain="Full fine-tuning does not fit or forgets too much",
    ),
    Method(
        name="cross-entropy",
        stage="adapt",
        role="Objective",
        title="Attention Is All You Need",
        arxiv="1706.03762",
        reference="next-token cross-entropy, on the answer's tokens only, LM head fused",
        object="residency.adapt.crossentropy:CrossEntropy",
        step="tune: {method: lora}",
        pain="The [tokens × vocabulary] logits do not fit in memory",
    ),
    Method(
        name="probe",
        stage="adapt",
        role="Predictor",
        title="Prototypical Networks for Few-shot Learning",
        arxiv="1703.05175",
        reference="Snell, Swersky, Zemel, NeurIPS 2017 (nearest prototype); logistic regression (linear)",
        object="residency.adapt.probe:Probe",
        step="tune: {method: probe}",
        pain="I want a classifier of images or texts from a few labels, on a frozen encoder",
    ),
    Method(
        name="bild",
        stage="compress",
        role="Objective",
        title="BiLD: Bi-directional Logits Difference Loss for Large Language Model Distillation",
        arxiv="2406.13555",
        reference="Li, Zhou, Song, COLING 2025",
        object="residency.compress.bild:BiLD",
        step="distill: {loss: bild}",
        pain="My distilled student copies the long tail of the logits and not the ranking",
    ),
    Method(
        name="kl",
        stage="compress",
        role="Objective",
        title="Distilling the Knowledge in a Neural Network",
        arxiv="1503.02531",
        reference="Hinton, Vinyals, Dean, 2015",
        object="residency.compress.kl:KL",
        step="distill: {loss: kl}",
        pain="I want a smaller model that answers like the large one",
    ),
    Method(
        name="depth-pruning",
        stage="compress",
        role="Surgery",
        title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        arxiv="2403.03853",
        reference="Men, Xu, Zhang et al., 2024 (block influence); greedy removal by loss is our choice",
        object="residency.compress.layers:keep_layers",
        step="distill: {student: {layers: 20}}",
        pain="The model has more layers than my task needs",
    ),
    Method(
        name="choice-accuracy",
        stage="evaluate",
        role="Metric",
        title="Surface Form Competition: Why the Highest Probability Answer Isn't Always Right",
        arxiv="2104.08315",
        reference="Holtzman, West, Shwartz et al., EMNLP 2021 (domain-conditional PMI)",
        object="residency.evaluate.choice:ChoiceAccuracy",
        step="task: {metric: choice-accuracy}",
        pain="Accuracy by plain likelihood rewards short, generic answers",
    ),
    Method(
        name="bits-per-byte",
        stage="evaluate",
        role="Metric",
        title="The Pile: An 800GB Dataset of Diverse Text for Language Modeling",
        arxiv="2101.00027",
        reference="Gao, Biderman, Black et al., 2020 (section 3.1)",
        object="residency.evaluate.bits_per_byte:BitsPerByte",
        step="task: {metric: bits-per-byte}",
        pain="Perplexities of two tokenizers cannot be compared",
    ),
    Method(
        name="exact-match",
        stage="evaluate",
        role="Metric",
        title="SQuAD: 100,000+ Questions for Machine Comprehension of Text",
        arxiv="1606.05250",
        reference="Rajpurkar, Zhang, Lopyrev, Liang, EMNLP 2016 (normalised exact match)",
        object="residency.evaluate.exact_match:ExactMatch",
        step="task: {metric: exact-match}",
        pain="My answers are short and have one right form",
    ),
    Method(
        name="rouge-l",
        stage="evaluate",
        role="Metric",
        title="ROUGE: A Package for Automatic Evaluation of Summaries",
        arxiv=None,
        reference="Lin, ACL Workshop 2004 (W04-1013)",
        object="residency.evaluate.rouge_l:RougeL",
        step="task: {metric: rouge-l}",
        pain="My answers are free text with a reference",
    ),
    Method(
        name="macro-f1",
        stage="evaluate",
        role="Metric",
        title="A comparison of event models for naive Bayes text classification; RCV1",
        arxiv=None,
        reference="Lewis, Yang, Rose, Li, JMLR 2004 (macro-averaged F1)",
        object="residency.evaluate.macro_f1:MacroF1",
        step="task: {metric: macro-f1}",
        pain="Rare classes count as much as common ones",
    ),
)

STEPS: tuple[StepRow, ...] = (
    StepRow(
        "curate", "residency.curate.steps:CurateByKShot", "by", "k-shot", "let the trusted rows choose from a pool"
    ),
    StepRow("tune", "residency.adapt.steps:TuneLora", "method", "lora", "train a LoRA adapter and merge it"),
    StepRow("tune", "residency.adapt.steps:TuneProbe", "method", "probe", "fit a head on a frozen encoder"),
    StepRow("distill", "residency.compress.steps:Distill", summary="train a smaller student on the current model"),
    StepRow("evaluate", "residency.evaluate.steps:Evaluate", summary="how the base and every model are examined"),
)

EXAM_STEP = "evaluate"
"""The step whose parameters say how every model of a run is examined."""

METRICS = tuple(m.name for m in METHODS if m.role == "Metric")


def load(target: str, extras: tuple[str, ...] = ()) -> Any:
    """Import `module:attribute`.

    Raises:
        MissingError: When the module needs a package that is not installed; the message names the extra.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "residency":
            raise
        extra = extras[0] if extras else "all"
        raise MissingError(
            f"{target} needs the package `{error.name}`, which is not installed",
            hint=f"pip install 'residency[{extra}]'",
        ) from None


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The known word most like a misspelt one, or None when nothing is alike."""
    lowered = {k.lower(): k for k in known}
    found = get_close_matches(str(word).lower().replace("_", "-"), list(lowered), n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def method(name: str) -> Method:
    """The catalogue row of a method.

    Raises:
        ResidencyError: When there is none; the message names the nearest.
    """
    for row in METHODS:
        if row.name == name:
            return row
    guess = nearest(name, [m.name for m in METHODS])
    raise ResidencyError(
        f"no method is called `{name}`" + (f"; did you mean `{guess}`?" if guess else ""),
        hint="`residency methods` lists them all",
    )


def step_rows(name: str) -> list[StepRow]:
    """All rows of a step name, default first; empty when unknown."""
    return [row for row in STEPS if row.name == name]


def step_names() -> list[str]:
    """The known step names, each once, in catalogue order."""
    return list(dict.fromkeys(row.name for row in STEPS))
