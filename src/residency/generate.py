"""Greedy answers for a list of prompts, in order, as they are ready.

At every step the most likely token is taken, until an end token or the limit: y_t = argmax_v p(v | q, y_<t). No
temperature, beam or penalty, not even one that the checkpoint's own generation_config asks for: two models
compared by their answers must decode by one rule (our choice, and the only one without a seed).

Prompts of one batch are padded at the LEFT, so that every row's next position is its last; the attention mask hides
the padding and positions count from the first real token. In fp32 the batch gives what single prompts give; in
bf16 rounding may break a tie differently, so keep `batch_size` equal between runs that will be compared.

Source: transformers' `generate`, which does the work, and through `options` takes any decoder of this package
(`custom_generate=...`). Cost: one prefill plus up to `max_new_tokens` steps per batch.
Inputs: token ids (the caller applies the chat template). Relations: `exact_match` and `rouge_l` grade the texts;
`choice` needs no generation and has less variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from residency.errors import DataError
from residency.modes import evaluating


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    end: int | Sequence[int] | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Iterator[str]:
    """Yield one text per prompt, in the order of the prompts, batch by batch.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, to decode and for its pad and end tokens.
        prompts: Token ids, at least one each.
        max_new_tokens: Most tokens per answer.
        batch_size: Prompts per forward pass.
        end: Id or ids that end an answer; None means those of the model, and of the tokenizer.
        device: Where the inputs go; the model's own device when None.
        **options: Handed to `model.generate`, such as `custom_generate`.

    Yields:
        The new text of each prompt, without special tokens.

    Raises:
        DataError: A prompt is empty.
        ValueError: max_new_tokens or batch_size is not positive.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; both must be positive")
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise DataError("the prompt has no tokens", where=f"prompt {empty[0]}", hint="begin it with the BOS token")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    ends = _ends(model, tokenizer, end)
    pad = next((i for i in (tokenizer.pad_token_id, *ends) if i is not None), 0)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends or None
    )
    for start in range(0, len(prompts), batch_size):
        batch = [list(prompt) for prompt in prompts[start : start + batch_size]]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=device)  # [B, T]
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
        with evaluating(model), only(model, config), torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=mask, **options)
        for row in output[:, width:].tolist():
            stop = next((k for k, token in enumerate(row) if token in ends), len(row))
            yield tokenizer.decode(row[:stop], skip_special_tokens=True)


def _ends(model: Any, tokenizer: Any, end: int | Sequence[int] | None) -> list[int]:
    """The ids that end an answer."""
    if end is not None:
        return [end] if isinstance(end, int) else list(end)
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(i for i in (*found, tokenizer.eos_token_id) if i is not None))


@contextmanager
def only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Let this be the only generation config, for `generate` fills what it lacks from the model's own."""
    owners = [m for m in model.modules() if isinstance(vars(m).get("generation_config"), GenerationConfig)]
    own = [m.generation_config for m in owners]
    try:
        for m in owners:
            m.generation_config = config
        yield
    finally:
        for m, old in zip(owners, own, strict=True):
            m.generation_config = old
