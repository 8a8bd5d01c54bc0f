"""What a row of the catalogue says: of a method, and of a recipe step."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

from residency.errors import MissingError

Stage = Literal["curate", "adapt", "compress", "infer", "evaluate", "federate"]
Role = Literal[
    "Scorer",
    "Selector",
    "Augmenter",
    "Objective",
    "Surgery",
    "Decoder",
    "Panel",
    "Metric",
    "Diagnostic",
    "Strategy",
    "Predictor",
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
