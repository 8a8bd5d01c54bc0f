"""A turn of a dialogue as one text for an encoder: what was said before, the turn again, and a gap for what is felt.

    [CLS] Ann: I got the job! [SEP] Bob: You did? [SEP] For utterance: You did? Bob feels [MASK] [SEP]
    └ context: the last `turns` turns and the turn itself ┘ └ the question, which is always kept whole ┘

The vector of the turn is the encoder's state at the mask (`trainable.pool`, pooling "mask"). Where it does not fit into
`max_tokens`, the context loses its beginning, token by token; when the question alone is too long, the repeated turn
does. (The release cuts the whole sequence on the left, its first special token with it: ours keeps that.)

Works with any tokenizer: `[CLS]`/`<s>`, `[SEP]`/`</s>` and `[MASK]`/`<mask>` are taken from it. Without a mask token
the text is the same without it, to be pooled otherwise. Special tokens that stand in a turn's own text are read as
plain text, so that nobody's "[MASK]" is taken for the gap.

The form is that of SPCL: Song, Huang, Xue, Hu, "Supervised Prototypical Contrastive Learning for Emotion Recognition in
Conversation", EMNLP 2022, arXiv 2210.08713; github.com/caskcsg/SPCL, commit cd48939 (read for facts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Dialogue = Sequence[tuple[str, str]]
"""(speaker, text) turn by turn; the last one is the turn in question."""

TURNS = 8
"""Turns before the one in question that are shown (the paper's)."""


def render(dialogue: Dialogue, tokenizer: Any, max_tokens: int = 256, turns: int = TURNS) -> list[int]:
    """Token ids of the last turn of a dialogue in its context.

    Args:
        dialogue: See `Dialogue`; a turn without a speaker has the empty text there.
        tokenizer: Of a BERT-like or RoBERTa-like encoder.
        max_tokens: At most so many ids.
        turns: How many turns before the last are shown; 0 for none.

    Returns:
        The ids, special tokens among them; with one mask token if the tokenizer has one.

    Raises:
        ValueError: When there is no turn, or `max_tokens` is too few for the question without its turn.
    """
    if not dialogue:
        raise ValueError("a dialogue needs at least one turn: the last one is what is asked about")
    speaker, said = dialogue[-1]
    end = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
    gap = [] if tokenizer.mask_token_id is None else [tokenizer.mask_token_id]
    start = [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
    context: list[int] = []
    for name, text in dialogue[-1 - turns :] if turns else dialogue[-1:]:
        context += [*_ids(f"{name}: {text}" if name else text, tokenizer), *end]
    asked = _ids("For utterance:", tokenizer)
    turn = _ids(f" {said}", tokenizer)
    feels = [*_ids(f" {speaker} feels" if speaker else " It feels", tokenizer), *gap, *end]
    left = max_tokens - len(start) - len(asked) - len(feels)
    if left < 1:
        raise ValueError(f"max_tokens = {max_tokens} leaves no room for the turn: {len(feels) + len(asked)} ask for it")
    turn = turn[-left:]
    left -= len(turn)
    return [*start, *(context[-left:] if left else []), *asked, *turn, *feels]


def _ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of plain text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
