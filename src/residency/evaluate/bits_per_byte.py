"""How many bits a model needs to write the reference answers, per byte of their text.

Perplexity depends on the tokenizer: a model with longer tokens has a higher one for the same text. Dividing the
information content by the bytes of the text, and not by tokens, makes models with different vocabularies comparable:

    bits per byte = - sum_i log2 p(answer_i | prompt_i)  /  sum_i bytes(answer_i)

Both sums run over the whole test set and are resampled together (`stats.ratio`): the mean of per-item ratios is
another number, ruled by the shortest answers. It is a proper score, so it moves before accuracy does, and unlike
accuracy it never saturates. 8 bits per byte is what storing the text costs; English text under a good model is
below 1. With perplexity per token PPL and n tokens in b bytes it is log2(PPL) n / b.

If the caller appends the end-of-answer token to the answer's ids, its bits count and its bytes do not: a small
constant that is the same for every model with that template.

Source: Gao et al. 2020, "The Pile", arXiv 2101.00027, section 3.1. Official code: EleutherAI/lm-evaluation-harness
(`bits_per_byte`). Conditioning on a prompt is our choice.

Empty-set policy: no items is an error (see `metric`); an answer without bytes is an error as well, for it has no
ratio. Cost: one `answer_logprobs` pass over the gold answers.
Inputs: token ids and the answers' texts. Relations: `choice` asks whether the right answer wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from residency.errors import DataError
from residency.evaluate.likelihood import answer_logprobs
from residency.evaluate.metric import Item, Metric, Score


class BitsPerByte(Metric):
    """Bits per UTF-8 byte of the reference answers; lower is better. State: one item each."""

    name: ClassVar[str] = "bits-per-byte"
    higher_is_better: ClassVar[bool] = False
    threshold: ClassVar[float | None] = None

    def update(self, id: str, logprob: float, answer: str) -> None:
        """Record one item.

        Args:
            id: The item's id.
            logprob: log p(answer | prompt) in nats, summed over tokens.
            answer: The answer's text.

        Raises:
            DataError: The answer has no bytes, or the log-probability is not finite.
        """
        size = len(answer.encode("utf-8", "surrogatepass"))
        if not size:
            raise DataError("the answer is empty, so bits per byte is undefined", where=id, hint="drop the row")
        self.add(Item(id, -logprob / math.log(2) / size, weight=size))


def bits_per_byte(
    model: Any,
    ids: Sequence[str],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    texts: Sequence[str],
    *,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> Score:
    """Bits per byte of a model on N items.

    Args:
        model: A causal language model.
        ids: N item ids.
        prompts: N prompts as token ids, at least one token each.
        answers: N reference answers as token ids.
        texts: The same answers as text, for their bytes.
        batch_tokens: See `answer_logprobs`.
        device: See `answer_logprobs`.

    Raises:
        DataError: An empty prompt or answer, no items, or a model whose outputs are not finite.
    """
    scored = answer_logprobs(model, prompts, [[a] for a in answers], batch_tokens=batch_tokens, device=device)
    metric = BitsPerByte()
    for id, [(total, _)], text in zip(ids, scored, texts, strict=True):
        metric.update(id, total, text)
    return metric.compute()
