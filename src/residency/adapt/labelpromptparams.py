"""The keys of label prompts, apart from what uses them, so that a recipe is checked without importing torch.

The equations stand in `residency.adapt.labelprompts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from residency.step import Params

if TYPE_CHECKING:
    from residency.labeltemplates import Prompter
    from residency.prompted import LabelView, Link

TEMPLATE = "{text} {sep} In terms of {label}, the sentence is about {mask}."
"""The dossier's reading of the paper's prompt; "our choice"."""


class LabelPrompts(Params):
    """How sentences are seen under labels, and how prototypes are made of them."""

    form: Literal["attention", "prompt", "plain"] = "attention"
    """Label-queried attention over one pass, a prompt per label (as many passes as labels), or no label at all."""
    template: str = TEMPLATE
    """The prompt: {text}, {label}, and {mask} or {sep} of the tokenizer; of form: prompt only."""
    pool: Literal["sentence", "mask"] = "sentence"
    """Where the prompt's vector is read: mean of the sentence's tokens, or the {mask}; of form: prompt only."""
    eta: float = Field(0.3, ge=0, le=1)
    """η, the share of the label's own vector in its prototype; 0 takes the shots alone."""
    focus: float = Field(0.0, ge=0)
    """φ, how much more a shot near the label's vector counts; 0 counts all alike."""
    loss: Literal["mse", "bce"] = "mse"
    """Squared error of softmax scores, or binary cross-entropy of sigmoid scores, whose threshold fits any N."""
    scale: float = Field(15.0, gt=0)
    """s before training, the inverse temperature of squared distances."""
    sharpness: float = Field(15.0, ge=0)
    """β before training, of form: attention only; 0 is the mean over tokens."""

    @model_validator(mode="after")
    def _every_key_counts(self) -> LabelPrompts:
        owners = {"template": "prompt", "pool": "prompt", "sharpness": "attention"}
        for name, owner in owners.items():
            if self.form != owner and getattr(self, name) != LabelPrompts.model_fields[name].default:
                raise ValueError(f"{name} belongs to form: {owner}, and form is {self.form}")
        return self

    @property
    def link(self) -> Link:
        """How scores come of z."""
        return "softmax" if self.loss == "mse" else "sigmoid"

    @property
    def names_labels(self) -> bool:
        """Whether label vectors e_n are read at all."""
        return self.form == "attention" or self.eta > 0 or self.focus > 0

    def view(self, encoder: Any) -> LabelView:
        """The model that `EpisodeLoss` trains."""
        from residency.prompted import LabelView

        return LabelView(encoder, self.form, scale=self.scale, sharpness=self.sharpness)

    def prompter(self, tokenizer: Any, max_tokens: int) -> Prompter:
        """What turns sentences into tokens for this form."""
        from residency.labeltemplates import Prompter

        if self.form == "prompt":
            return Prompter(tokenizer, self.template, self.pool, max_tokens)
        return Prompter(tokenizer, max_tokens=max_tokens)
