"""Further passes over the rows: weakened models, perturbed questions, generated answers.

    Subnets     the model with a share r of the inputs of every linear layer set to zero (the rest scaled by
                1 / (1 − r), as dropout does), for several r; gives the mean over them of the answer's nll, and of its
                confidence exp(−nll) = 1 / PPL
    Perturbed   the question with each word dropped with probability r, K times; gives the mean over the K of
                |p(a_t | q, a_<t) − p(a_t | q_k, a_<t)|, averaged over answer tokens, and of the difference of the two
                answers' likelihoods per token, |exp(−nll) − exp(−nll_k)|
    Greedy      the model continues from the question by itself; gives the share of the answer's first tokens that it
                writes at their places

A subnet is one mask for all rows, drawn from the seed and the layer's name, so a row's value depends on no other row;
which words are dropped is drawn from the seed and the row's own question. A question keeps at least one word. Greedy
answers are generated in batches of equal prompt length, without padding.

Learning complexity: Jiang et al. 2024 (arXiv 2402.05356), who mask weights of the model at several ratios; no code
found. That inputs of layers are masked rather than single weights is our choice: it needs no second copy of them.
Prompt uncertainty: Kung et al. 2023 (arXiv 2311.00288), code PlusLabNLP/Active-IT at 5807f2b, which drops words of a
task's definition (rate 0.2, 20 times) and compares exp(−loss) of whole answers; per token is the form of survey
2408.02085, eq. 47 (it prints a minus in front; here high is uncertain). Memorisation: Biderman et al. 2023 (arXiv
2304.11158), 32 tokens.

Cost: a forward pass per subnet; K + 1 per row for `Perturbed`; one cached generation step per token for `Greedy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby
from random import Random
from typing import Any

import numpy as np

from residency.curate.forward import Reader
from residency.curate.reading import Entry, Pass
from residency.curate.scoring import Array

QUESTIONS = 64
"""Rows whose perturbed questions are held at a time."""


@dataclass(frozen=True)
class Subnets(Pass):
    """The answer's likelihood under weakened models.

    Args:
        rates: Shares of inputs set to zero, one subnet each.
        seed: Of the masks.
    """

    rates: tuple[float, ...]
    seed: int

    @property
    def runs(self) -> int:
        """See `Pass.runs`."""
        return len(self.rates)

    def run(self, reader: Reader, entries: Sequence[Entry]) -> dict[str, Array]:
        """See `Pass.run`."""
        pairs = [(e.prompt, e.answer) for e in entries]
        nll = np.empty((len(entries), len(self.rates)))
        for i, rate in enumerate(self.rates):
            with weakened(reader.model, rate, f"{self.seed}/{i}"):
                nll[:, i] = [t[0].mean(dtype=float) for t in reader.tokens(pairs, only_nll=True)]
        return {"nll": nll.mean(1), "confidence": np.exp(-nll).mean(1)}


@contextmanager
def weakened(model: Any, rate: float, seed: str) -> Iterator[None]:
    """A model whose linear layers, all but the head, lose a share of their inputs.

    Args:
        model: Left as it was afterwards.
        rate: Probability that an input of a layer is set to zero; the rest is scaled by 1 / (1 − rate).
        seed: Of the masks, together with each layer's name.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    def masked(width: int, name: str, device: Any) -> Any:
        generator = torch.Generator().manual_seed(_number(f"{seed}/{name}"))
        mask = (torch.rand(width, generator=generator) >= rate).float().div_(1 - rate).to(device)
        return lambda _, args: (args[0] * mask.to(args[0].dtype), *args[1:])

    head, hooks = model.get_output_embeddings(), []
    for name, module in model.named_modules():
        if module is not head and isinstance(module, nn.Linear | Conv1D):
            width = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            hooks.append(module.register_forward_pre_hook(masked(width, name, module.weight.device)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Perturbed(Pass):
    """How far the answer's probabilities move when words of the question are missing.

    Args:
        times: K, questions per row.
        drop: Probability that a word is dropped.
        seed: Of the choice of words.
    """

    times: int
    drop: float
    seed: int

    @property
    def runs(self) -> int:
        """See `Pass.runs`."""
        return self.times + 1

    def run(self, reader: Reader, entries: Sequence[Entry]) -> dict[str, Array]:
        """See `Pass.run`."""
        token, answer = np.empty(len(entries)), np.empty(len(entries))
        for start in range(0, len(entries), QUESTIONS):
            some = entries[start : start + QUESTIONS]
            pairs = [(p, e.answer) for e in some for p in (e.prompt, *self.prompts(e, reader.tokenizer))]
            nll = [t[0].astype(float) for t in reader.tokens(pairs, only_nll=True)]
            for i in range(len(some)):
                own, *others = nll[i * (self.times + 1) : (i + 1) * (self.times + 1)]
                token[start + i] = np.mean([np.abs(np.exp(-own) - np.exp(-other)).mean() for other in others])
                answer[start + i] = np.mean([abs(np.exp(-own.mean()) - np.exp(-other.mean())) for other in others])
        return {"token": token, "answer": answer}

    def prompts(self, entry: Entry, tokenizer: Any) -> list[tuple[int, ...]]:
        """The row's prompt with words of its last user turn missing, K times."""
        from residency.tokens import encode

        row = entry.row
        at = max((i for i, (role, _) in enumerate(row.messages[:-1]) if role == "user"), default=None)
        if at is None:
            return [entry.prompt] * self.times
        question = row.messages[at][1]
        random, found = Random(_number(f"{self.seed}/{question}")), []
        for _ in range(self.times):
            turns = (*row.messages[:at], ("user", without_words(question, self.drop, random)), *row.messages[at + 1 :])
            found.append(encode(replace(row, messages=turns), tokenizer).prompt)
        return found


def without_words(text: str, rate: float, random: Random) -> str:
    """A text whose words were dropped with a probability each; white space between the others becomes one space."""
    words = text.split()
    kept = [word for word in words if random.random() >= rate]
    return " ".join(kept or words[:1]) if len(kept) < len(words) else text


@dataclass(frozen=True)
class Greedy(Pass):
    """What the model writes by itself after the question.

    Args:
        window: Tokens to write and compare, None for the whole answer; a shorter answer is compared as far as it goes.
    """

    window: int | None

    def run(self, reader: Reader, entries: Sequence[Entry]) -> dict[str, Array]:
        """See `Pass.run`."""
        import torch

        hits = np.empty(len(entries))
        order = sorted(range(len(entries)), key=lambda i: (len(entries[i].prompt), len(entries[i].answer)))
        for length, group in groupby(order, key=lambda i: len(entries[i].prompt)):
            same = list(group)
            size = max(1, reader.batch_tokens // (length + len(entries[same[-1]].answer[: self.window])))
            for some in (same[start : start + size] for start in range(0, len(same), size)):
                true = [np.array(entries[i].answer[: self.window]) for i in some]
                ids = torch.tensor([entries[i].prompt for i in some], device=reader.device)
                written = _continued(reader.model, ids, max(map(len, true)))
                for i, answer, row in zip(some, true, written, strict=True):
                    hits[i] = (row[: len(answer)] == answer).mean()
                reader.advance(len(some))
        return {"hits": hits}


def _continued(model: Any, ids: Any, count: int) -> Any:
    """What a model writes behind ids [B, T], [B, count]; `generate` would heed penalties of the model's own config."""
    import torch

    written: list[Any] = []
    cache = None
    while len(written) < count:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        written.append(ids)
    return torch.cat(written, 1).cpu().numpy()


def _number(text: str) -> int:
    """A seed of 63 bits."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
