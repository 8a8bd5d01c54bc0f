"""Which of four answers is right? Chosen by likelihood, corrected for how likely each answer is anyway.

A generative model that never saw an answer sheet can still take a multiple-choice test: it prefers the answer it
finds most likely. But short and common strings are likely after ANY question, and several wordings of one answer
share its probability ("surface form competition"). Dividing by the probability of the answer without the question
leaves what the question adds:

    argmax_a  log p(a | q) - log p(a | no question)                      (domain-conditional PMI)

The second term needs no labels and depends on the answer alone, so it is computed once per distinct answer. The
caller passes the context that stands for "no question": the same chat template with an empty or neutral question.

An open question-and-answer set becomes such a test by drawing the wrong answers from the other held-out items
(`distractors`): never from what the model was tuned on, which it would prefer for the wrong reason.

Ties: an item counts as right only if the gold answer beats every other candidate STRICTLY. A model that gives the
same score to everything gets 0, not the credit of standing first in the list (our choice).

Paper: Holtzman, West, Shwartz, Choi & Zettlemoyer 2021, "Surface Form Competition: Why the Highest Probability
Answer Isn't Always Right", arXiv 2104.08315. Official code: peterwestuw/surface-form-competition.
Distractors from sibling items are our choice. Chance is 1 / (number of candidates).

Cost: one `answer_logprobs` pass over all candidates plus one over the distinct answers.
Inputs: token ids of prompts and candidates. Relations: `bits_per_byte` moves earlier when a model improves slowly;
`exact_match` and `rouge_l` grade written answers.
"""

from __future__ import annotations

import functools
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from residency.errors import DataError
from residency.evaluate.likelihood import answer_logprobs
from residency.evaluate.metric import Item, Metric, Score


@dataclass(frozen=True)
class Question:
    """One multiple-choice item.

    Args:
        id: The item's id.
        prompt: Token ids of the question, up to where the answer begins.
        answers: The candidates' texts, for the record and for telling answers apart.
        tokens: The candidates' token ids, in the same order.
        gold: Index of the right candidate.
    """

    id: str
    prompt: Sequence[int]
    answers: Sequence[str]
    tokens: Sequence[Sequence[int]]
    gold: int = 0


class ChoiceAccuracy(Metric):
    """Share of items whose gold answer beats every other candidate strictly. State: one item each."""

    name: ClassVar[str] = "choice-accuracy"

    def update(
        self,
        id: str,
        answers: Sequence[str],
        conditional: Sequence[float],
        unconditional: Sequence[float] | None = None,
        gold: int = 0,
    ) -> None:
        """Score one item from its K candidates.

        Args:
            id: The item's id.
            answers: K texts.
            conditional: K values of log p(a | q).
            unconditional: K values of log p(a | no question); None ranks by log p(a | q) alone.
            gold: Index of the right one.

        Raises:
            DataError: Fewer than two candidates, the gold answer twice, a log-probability that is not finite, a
                repeated id.
            ValueError: Lists of different lengths or a gold index out of range.
        """
        base = [0.0] * len(conditional) if unconditional is None else unconditional
        if not len(answers) == len(conditional) == len(base) or not 0 <= gold < len(answers):
            raise ValueError(f"{id}: {len(answers)} answers, {len(conditional)} scores, gold {gold} do not fit")
        if len(answers) < 2:
            raise DataError("a choice needs at least two candidates", where=id, hint="see `distractors`")
        if answers[gold] in (answer for k, answer in enumerate(answers) if k != gold):
            raise DataError("the right answer is among the wrong ones", where=id, hint="see `distractors`")
        pmi = [float(c) - float(u) for c, u in zip(conditional, base, strict=True)]
        if not all(abs(value) < float("inf") for value in pmi):  # false for nan too
            raise DataError("a log-probability is not finite", where=id, hint="did the previous step diverge?")
        others = max((k for k in range(len(pmi)) if k != gold), key=lambda k: pmi[k])
        right = pmi[gold] > pmi[others]
        self.add(Item(id, float(right), prediction=answers[gold if right else others]))


def choice_accuracy(
    model: Any,
    questions: Sequence[Question],
    unconditional: Sequence[int] | None,
    *,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> Score:
    """Choice accuracy of a model.

    Args:
        model: A causal language model.
        questions: The items.
        unconditional: Token ids of the context that asks nothing; None ranks by log p(a | q) alone.
        batch_tokens: See `answer_logprobs`.
        device: See `answer_logprobs`.

    Returns:
        The score; its items carry the text the model chose.

    Raises:
        DataError: No questions, an empty prompt, or a model whose outputs are not finite.
    """
    run = functools.partial(answer_logprobs, model, batch_tokens=batch_tokens, device=device)
    scored = run([q.prompt for q in questions], [q.tokens for q in questions])
    base: dict[tuple[int, ...], float] = {}
    if unconditional is not None:
        distinct = list(dict.fromkeys(tuple(answer) for q in questions for answer in q.tokens))
        alone = run([unconditional], [distinct])[0]
        base = {answer: total for answer, (total, _) in zip(distinct, alone, strict=True)}
    metric = ChoiceAccuracy()
    for question, row in zip(questions, scored, strict=True):
        without = [base[tuple(answer)] for answer in question.tokens] if base else None
        metric.update(question.id, question.answers, [total for total, _ in row], without, question.gold)
    return metric.compute()


def distractors(items: Mapping[str, str], n: int = 3, seed: int = 0) -> dict[str, list[str]]:
    """Draw wrong answers for each item from the other items.

    Args:
        items: Item id → gold answer, of the held-out set only.
        n: Wrong answers per item.
        seed: With the item's id, seeds that item's own draw: the same for any order of `items`.

    Returns:
        Item id → n ids whose answers differ from the item's own and from each other, compared without case,
        punctuation and spacing. Of items that share one answer, the first id in sorted order stands for all.

    Raises:
        DataError: Fewer than n + 1 distinct answers, or an empty one.
    """
    keys = {id: _plain(answer) for id, answer in items.items()}
    if blank := [id for id, key in keys.items() if not key]:
        raise DataError("the answer is empty", where=blank[0], hint="drop the row or give it an answer")
    first: dict[str, str] = {}
    for id in sorted(items):
        first.setdefault(keys[id], id)
    if len(first) < n + 1:
        raise DataError(
            f"{n} wrong answers per item need {n + 1} distinct answers; these {len(items)} items have {len(first)}",
            hint="hold out more items, or ask for fewer distractors",
        )
    pool = list(first)
    drawn = {}
    for id in items:
        picks = random.Random(f"{seed}:{id}").sample(pool, n + 1)  # one to spare, should the gold be among them
        drawn[id] = [first[key] for key in picks if key != keys[id]][:n]
    return drawn


def _plain(answer: str) -> str:
    """An answer without case, ASCII punctuation and spacing; kept as it is if nothing else remains."""
    words = answer.casefold().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(words) or answer.strip()
