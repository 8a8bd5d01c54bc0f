"""Texts a model writes itself, to train its drafter on: a drafter has to guess what this model says, not what is true.

Answers are written greedily, `samples` − 1 more are drawn at a temperature for variety. Prompts of similar length go
into one batch, padded on the left. Every batch is drawn from its own seed, so the texts do not depend on what ran
before, and writing can go on after any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from residency.packed import packed


def answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    pad: int,
    ends: Sequence[int],
    samples: int = 1,
    temperature: float = 0.8,
    batch: int = 32,
    seed: int = 0,
    skip: int = 0,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Write answers.

    Args:
        model: A causal language model.
        prompts: Token ids, at least one each.
        new_tokens: Most tokens per answer.
        pad: Padding id.
        ends: Ids that end an answer (kept as its last token).
        samples: Answers per prompt; the first is greedy.
        temperature: Of the others.
        batch: Prompts per pass.
        seed: Of the draws; the global random state is left as it was.
        skip: Batches that were written before.

    Yields:
        (index of the prompt, answer ids) of a batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    device = next(model.parameters()).device
    settings = {"max_new_tokens": new_tokens, "pad_token_id": pad, "eos_token_id": list(ends) or None}
    with packed(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for sample in range(samples):
            how = {"do_sample": True, "temperature": temperature, "top_k": 0} if sample else {"do_sample": False}
            for start in range(0, len(order), batch):
                if skip:
                    skip -= 1
                    continue
                part = order[start : start + batch]
                width = max(len(prompts[i]) for i in part)
                ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in part], device=device)
                mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
                torch.manual_seed((seed << 32) + (sample << 24) + start)
                with torch.inference_mode():
                    said = model.generate(ids, attention_mask=mask.to(device), **settings, **how)[:, width:].tolist()
                stops = [next((k + 1 for k, token in enumerate(row) if token in ends), len(row)) for row in said]
                yield [(i, row[:stop]) for i, row, stop in zip(part, said, stops, strict=True)]
