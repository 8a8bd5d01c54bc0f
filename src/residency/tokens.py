"""Rows → token ids: which tokens are the prompt, which are the answer and are trained.

A chat row is rendered with the model's own chat template; the answer is everything after the generation prompt,
end-of-turn included. A prompt/completion row is concatenated as it stands and ends with the end-of-text token.
Prompt and answer are tokenised apart, as they are at inference, so that the boundary never merges into one token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from residency.errors import DataError
from residency.objective import IGNORE
from residency.rows import Refused, Row


@dataclass(frozen=True)
class Encoded:
    """One row as token ids. `prompt` is context, `answer` is trained."""

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def rendered(row: Row, tokenizer: Any) -> tuple[str, str, list[int]]:
    """The text before the answer, the answer with what the template puts behind it, and ids that end the sequence.

    Raises:
        DataError: When the template does not put the answer after the generation prompt.
    """
    if not row.messages:
        raise DataError("a row to classify has no answer to train a language model on", where=row.id)
    if row.chat and getattr(tokenizer, "chat_template", None):
        turns = [{"role": r, "content": c} for r, c in row.messages]
        try:
            prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError as error:
            raise DataError(f"the chat template refuses this row: {error}", where=row.id) from None
        if not whole.startswith(prompt):
            raise DataError(
                "the chat template does not continue its own generation prompt, so the answer's tokens cannot be found",
                where=row.id,
                hint="give rows as prompt/completion, or repair the tokenizer's chat template",
            )
        return prompt, whole[len(prompt) :].rstrip("\n"), []
    said = [content for _, content in row.messages[:-1]]
    prompt = "\n".join(said) + "\n" if row.chat else row.messages[0][1]
    return prompt, row.answer, [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []


def encode(row: Row, tokenizer: Any) -> Encoded:
    """Render and tokenise one row.

    Raises:
        DataError: When the template does not put the answer after the generation prompt, or the answer has no tokens.
    """
    prompt, answer, end = rendered(row, tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    trained = tokenizer(answer, add_special_tokens=False)["input_ids"] + end
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids or not trained:
        raise DataError("the row has no tokens to train", where=row.id)
    return Encoded(row.id, tuple(ids), tuple(trained))


def encode_all(rows: Iterable[Row], tokenizer: Any, max_tokens: int) -> tuple[list[Encoded], list[Refused]]:
    """Encode rows; those with more than `max_tokens` tokens are refused with the count."""
    kept, refused = [], []
    for row in rows:
        try:
            item = encode(row, tokenizer)
        except DataError as error:
            refused.append(Refused(row.source, row.line, error.what, row.prompt[:200]))
            continue
        if len(item) > max_tokens:
            reason = f"too long: {len(item):,} tokens, at most {max_tokens:,}"
            refused.append(Refused(row.source, row.line, reason, row.prompt[:200]))
        else:
            kept.append(item)
    return kept, refused


def collate(items: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """Right-padded tensors: input_ids, attention_mask, labels, each [B, T]; labels are `IGNORE` outside the answers."""
    import torch

    width = max(len(item) for item in items)
    ids = torch.full((len(items), width), pad)
    mask = torch.zeros((len(items), width), dtype=torch.long)
    labels = torch.full((len(items), width), IGNORE)
    for i, item in enumerate(items):
        n = len(item)
        ids[i, :n] = torch.tensor(item.prompt + item.answer)
        mask[i, :n] = 1
        labels[i, len(item.prompt) : n] = torch.tensor(item.answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Labelled:
    """One text as token ids, and what is to be predicted of it: a class index, or a number."""

    id: str
    tokens: tuple[int, ...]
    label: int | float

    def __len__(self) -> int:
        return len(self.tokens)


def encode_labelled(
    rows: Iterable[Row], tokenizer: Any, classes: Sequence[str] | None, max_tokens: int
) -> tuple[list[Labelled], list[Refused]]:
    """Encode rows of text and label for a classification head.

    Args:
        rows: Those without a text are refused.
        tokenizer: Adds its own special tokens.
        classes: Class names, whose positions are the labels; None reads every label as a number (regression).
        max_tokens: Longer texts are cut here, as encoders do; nothing of the label is lost by it.
    """
    kept, refused = [], []
    for row in rows:
        label: int | float
        try:
            if row.text is None or row.label is None:
                raise ValueError("the row has no text with a label")
            label = float(row.label) if classes is None else classes.index(row.label)
            if not math.isfinite(label):
                raise ValueError(f"the label {row.label!r} is not a finite number")
        except ValueError as error:
            refused.append(Refused(row.source, row.line, str(error), (row.text or "")[:200]))
            continue
        ids = tokenizer(row.text, truncation=True, max_length=max_tokens)["input_ids"]
        kept.append(Labelled(row.id, tuple(ids), label))
    return kept, refused


def collate_labelled(items: Sequence[Labelled], pad: int) -> dict[str, Any]:
    """Right-padded input_ids and attention_mask [B, T]; labels [B], long for classes and float32 for numbers."""
    import torch

    width = max(len(item) for item in items)
    ids = torch.full((len(items), width), pad)
    mask = torch.zeros((len(items), width), dtype=torch.long)
    for i, item in enumerate(items):
        ids[i, : len(item)] = torch.tensor(item.tokens)
        mask[i, : len(item)] = 1
    numbers = any(isinstance(item.label, float) for item in items)
    labels = torch.tensor([item.label for item in items], dtype=torch.float32 if numbers else torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def preview(items: Sequence[Encoded], tokenizer: Any) -> list[list[tuple[str, bool]]]:
    """For each row its tokens as text with whether they are trained: what the command line colours."""
    return [
        [(tokenizer.decode([t]), False) for t in item.prompt] + [(tokenizer.decode([t]), True) for t in item.answer]
        for item in items
    ]
