"""Templates with a sentence and a label, filled and tokenised, and which of the tokens are the sentence's.

A template is text with {text} once and perhaps {label}, {mask} and {sep}. What is later averaged are the sentence's own
tokens, found by their places in the filled text (a fast tokenizer reports them), or the one mask token that stands in
the template; special tokens and the template's words never are, even where the sentence repeats them or spells
"[MASK]". A sentence that is too long is cut between its tokens, the template never.

Prompts that hold a label: Guan, Zhu, Bai, Wang, "Label-Guided Prompt for Multi-label Few-shot Aspect Category
Detection", 2024, arXiv 2407.20673, whose wording is unknown. Cost: one tokenizer call per (sentence, template).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from residency.errors import DataError, PlanError

Pool = Literal["sentence", "mask"]
PLAIN = "{text}"
"""The template without a label."""


@dataclass(frozen=True)
class Marked:
    """One text as token ids, and which of its tokens are pooled."""

    ids: tuple[int, ...]
    pool: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Prompter:
    """Fills a template and finds the sentence's tokens, or the mask, in it.

    Args:
        tokenizer: A fast tokenizer; it adds its own special tokens.
        template: Text with {text} once, and any of {label}, {mask}, {sep}.
        pool: What is averaged: the sentence's own tokens, or the mask token of the template.
        max_tokens: Longer sentences are cut, the template never.

    Raises:
        PlanError: When the template or the tokenizer cannot do that.
    """

    def __init__(self, tokenizer: Any, template: str = PLAIN, pool: Pool = "sentence", max_tokens: int = 128) -> None:
        check_template(template, pool)
        if "{mask}" in template and tokenizer.mask_token is None:
            raise PlanError(
                "the template has {mask}, but this base's tokenizer has no mask token",
                hint="leave {mask} out and use pool: sentence",
            )
        if not tokenizer.is_fast:
            raise PlanError("label prompts need a fast tokenizer (with offsets)", where=type(tokenizer).__name__)
        self.tokenizer, self.template, self.pool, self.max_tokens = tokenizer, template, pool, max_tokens
        self.before, self.after = template.split("{text}")

    def __call__(self, text: str, label: str = "") -> Marked:
        """The filled template as tokens.

        Raises:
            DataError: When the template alone is longer than `max_tokens`.
        """
        words = {"label": label, "mask": self.tokenizer.mask_token or "", "sep": self.tokenizer.sep_token or ""}
        before, after = self.before.format(**words), self.after.format(**words)
        given = self.tokenizer(f"{before}{text}{after}", return_offsets_mapping=True)
        if len(given["input_ids"]) > self.max_tokens:
            frame = len(self.tokenizer(before + after)["input_ids"])
            inside = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            # a cut word may fall into other tokens than the whole one had: take one away until it fits
            for keep in range(min(self.max_tokens - frame, len(inside)), 0, -1):
                text = text[: inside[keep - 1][1]]
                given = self.tokenizer(f"{before}{text}{after}", return_offsets_mapping=True)
                if len(given["input_ids"]) <= self.max_tokens:
                    break
            else:
                raise DataError(
                    f"the prompt for the label {label!r} leaves no room in {self.max_tokens} tokens",
                    hint="raise max-tokens, or shorten the template",
                )
        start, end = len(before), len(before) + len(text)
        ids, spans = given["input_ids"], given["offset_mapping"]
        inside = [a < end and b > start and b > a for a, b in spans]
        if self.pool == "mask":
            pool = [i == self.tokenizer.mask_token_id and not own for i, own in zip(ids, inside, strict=True)]
        else:
            pool = inside
        return Marked(tuple(ids), tuple(pool if any(pool) else [True] * len(ids)))


def check_template(template: str, pool: Pool) -> None:
    """Refuse a template that cannot be filled or pooled.

    Raises:
        PlanError: With what to change.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise PlanError(f"the template {template!r} cannot be read: {error}", hint="write {{ for a brace") from None
    if unknown := [n for n in names if n not in ("text", "label", "mask", "sep")]:
        raise PlanError(f"the template has {{{unknown[0]}}}", hint="known: {text}, {label}, {mask}, {sep}")
    if names.count("text") != 1 or template.count("{text}") != 1:
        raise PlanError(f"the template {template!r} must hold {{text}} once")
    if pool == "mask" and names.count("mask") != 1:
        raise PlanError("pool: mask needs {mask} once in the template", hint="or pool: sentence")


def collate_marked(items: Sequence[Marked], pad: int) -> dict[str, Tensor]:
    """Right-padded input_ids, attention_mask and pool (bool), each [P, T]."""
    width = max((len(item) for item in items), default=1)
    ids = torch.full((len(items), width), pad)
    mask = torch.zeros((len(items), width), dtype=torch.long)
    pool = torch.zeros((len(items), width), dtype=torch.bool)
    for i, item in enumerate(items):
        ids[i, : len(item)] = torch.tensor(item.ids)
        mask[i, : len(item)] = 1
        pool[i, : len(item)] = torch.tensor(item.pool)
    return {"input_ids": ids, "attention_mask": mask, "pool": pool}
