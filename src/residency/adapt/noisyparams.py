"""Keys of `tune: {method: fopro}` and `tune: {method: capro}`, apart from what they do.

Defaults are the papers' (see `fopro.py` and `capro.py`) where nothing else is said.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from residency.trainparams import TrainParams


class NoisyParams(TrainParams):
    """Keys of both steps."""

    noisy: str = Field(min_length=1)
    """Many rows with noisy labels, images perhaps with a caption: a file, a `datasets` folder, or `embedded:NAME`."""
    train: Literal["adapter", "encoder"] = "adapter"
    """Train a small network on the vectors of the frozen encoder, or the whole encoder."""
    hidden: int = Field(256, ge=1)
    """Units inside the adapter."""
    views: int = Field(2, ge=0, le=32)
    """How many changed views of every row an adapter is trained on; 0 shows rows as they are only."""
    mirror: bool = False
    """Whether a changed image may be mirrored; digits and letters may not."""
    project: int = Field(128, ge=2)
    """Width of the space of prototypes."""
    middle: int = Field(256, ge=2)
    """Units between the features and that space; the papers' 2,048."""
    queue: int = Field(4096, ge=1)
    """Keys of earlier batches that a row is contrasted with."""
    temperature: float = Field(0.1, gt=0)
    """τ of the contrasts and the auxiliary classifier."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the classifier against the prototypes when labels are judged."""
    relabel: float = Field(0.6, gt=0, le=1)
    """A label is replaced by one whose score is above this."""
    keep: float | None = Field(None, ge=0, le=1)
    """A label stands if its score is above this; better than chance, 1/C, where none is given."""
    momentum: float = Field(0.999, ge=0, lt=1)
    """Of the slow copy of the model that makes the keys."""
    polish: float = Field(0.999, ge=0, lt=1)
    """Of the prototypes, per row."""
    instance: float = Field(1.0, ge=0)
    """Weight of the contrast between a row and all others; 0 leaves it out."""
    official: bool = False
    """Do what the release does where it departs from its equations."""
    max_tokens: int = Field(128, ge=8)
    """Longer texts are cut here when the encoder is trained."""
    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate of AdamW; a cosine to zero after the warm-up. Noise is learnt by heart at a higher one."""
    epochs: float = Field(20.0, gt=0, le=1000)
    """Passes over all rows, trusted and noisy."""
    batch: int = Field(32, ge=2)
    """Rows per forward pass."""

    @model_validator(mode="after")
    def _keys_are_read(self) -> NoisyParams:
        lost = self.model_fields_set & ({"hidden", "views"} if self.train == "encoder" else {"max_tokens"})
        if lost:
            names = ", ".join(f"`{name.replace('_', '-')}`" for name in sorted(lost))
            raise ValueError(f"train: {self.train} does not read {names}")
        return self


class FoProParams(NoisyParams):
    """Keys of `tune: {method: fopro}`."""

    prototypes_from: float = Field(0.3, ge=0, le=1)
    """Share of the training after which there are prototypes."""
    clean_from: float = Field(0.4, ge=0, le=1)
    """Share of the training after which labels are replaced and rows dropped."""
    relation_from: float = Field(0.5, ge=0, le=1)
    """Share of the training after which the learned metric has a say."""
    margin: float = Field(0.5, ge=0)
    """By how much more a trusted row must be like its prototype than like others."""
    sigma: float | None = Field(None, ge=0)
    """A row teaches the auxiliary classifier, before cleaning, if its cosines to all prototypes differ in sum by no
    more than this, halved, from those of its label's prototype; 0.05 per class where none is given.
    """

    @model_validator(mode="after")
    def _rising(self) -> FoProParams:
        if not self.prototypes_from <= self.clean_from <= self.relation_from:
            raise ValueError("phases come in order: prototypes-from ≤ clean-from ≤ relation-from")
        return self


class CAProParams(NoisyParams):
    """Keys of `tune: {method: capro}`."""

    texts: str | dict[str, str] = Field({})
    """A text about every class: a mapping from class to text, or rows of text + label; a class's name where there is
    none.
    """
    text_encoder: str | None = "all-minilm-l6-v2"
    """Reads captions and class texts: an embedded base, a local folder, or a hub id; null for the base itself, where
    the rows are texts.
    """
    select: int = Field(50, ge=1)
    """K, rows per class whose captions fit best and which are then trusted."""
    neighbours: int = Field(20, ge=1)
    """Rows that look most alike, from which those are taken whose captions count for a row."""
    smooth: int = Field(20, ge=0)
    """How many of them count, the paper's 4 or all; 0 leaves captions as they are."""
    self_weight: float = Field(0.0, ge=0, le=1)
    """Weight of a row's own caption against its neighbours'."""
    beta: float = Field(0.1, ge=0, le=1)
    """Weight of what rows that look alike think of a row."""
    prototypes_from: float = Field(0.1, ge=0, le=1)
    """Share of the training after which there are prototypes."""
    clean_from: float = Field(0.2, ge=0, le=1)
    """Share of the training after which labels are replaced and rows dropped."""

    @model_validator(mode="after")
    def _fits(self) -> CAProParams:
        if self.prototypes_from > self.clean_from:
            raise ValueError("phases come in order: prototypes-from ≤ clean-from")
        if self.smooth > self.neighbours:
            raise ValueError(f"smooth: {self.smooth} neighbours cannot be taken of {self.neighbours}")
        return self
