"""What a judge says of a row: a reward model, a chat model that writes a number, or the digits it leans to.

    reward    r(question, answer): the one logit of a sequence classifier
    judge     a number in lowest … highest that a chat model gives the answer's quality, or the question's complexity
    digits    Σ_k k softmax(z at the digits lowest … highest)_k: the expected number, from the logits z of the token
              that would follow; finer than the number written, and the same at every call

The scores here are told what to call. `reward` is any callable (questions, answers) → N numbers, such as
`RewardModel(model, tokenizer)`. `judge` is any callable (messages) → str | float, with messages as chat APIs take
them: one user turn; its attribute `many`, where it has one, is called with the list of all conversations instead, so
that requests can run at once. `DigitJudge(model, tokenizer)` is one. Nothing is retried. A reply without a number on
the scale is NaN: the NaNs of the column, less the empty rows, count what could not be read. Prompts are our own.

AlpaGasus (Chen et al. 2023, "AlpaGasus: Training A Better Alpaca with Fewer Data", arXiv 2307.08701) asks a chat model
for 0 to 5 and keeps 4.5 and more: `lowest: 0, highest: 5`. DEITA (Liu et al. 2023, arXiv 2312.15685) takes the
expected value over the digits 1 to 6 of a model tuned to score; its code (hkust-nlp/deita at b279f2c) hard-codes the
token ids of two tokenizers, and gives 3.0 where a digit is missing. Judges prefer long answers and their own; look at
the rank correlation with length before you trust one.

Cost: one call per row; no memory beyond the prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from residency.curate.forward import Reader, batches
from residency.curate.scoring import Array, Score

QUALITY = """\
Rate how good this answer is: whether it is correct, complete, clear and to the point.

[Question]
{question}

[Answer]
{answer}

[Rating]
From {lowest} (useless) to {highest} (could not be better). Reply with the number only."""

COMPLEXITY = """\
Rate how demanding this request is: how much knowledge, how many steps and how much care a good answer takes.

[Request]
{question}

[Rating]
From {lowest} (trivial) to {highest} (only an expert could answer). Reply with the number only."""

_NUMBER = r"(?<![\w.,/-])-?\d+(?:\.\d+)?(?![\w/]|-\d)"
_OUT_OF = re.compile(r"\s*(?:/|out of)\s*\d+(?:\.\d+)?", re.IGNORECASE)
_NAMED = re.compile(rf"(?:score|rating)\W{{0,9}}(?:is\W{{0,4}})?({_NUMBER})", re.IGNORECASE)


def number_in(reply: str) -> float:
    """The number a reply gives; NaN where there is none, or which one is meant is not clear.

    In this order: after "score" or "rating"; at the beginning; the only one there is. "4/5" and "4 out of 5" are 4.
    """
    text = _OUT_OF.sub(" ", reply.strip().strip("*_`\"' "))
    named = _NAMED.findall(text)
    if named:
        return float(named[-1])
    found = re.findall(_NUMBER, text)
    if found and (len(found) == 1 or text.startswith(found[0])):
        return float(found[0])
    return np.nan


class Judge(Score):
    """What a chat model thinks of a row."""

    needs = ("questions", "answers", "judge")

    aspect: Literal["quality", "complexity"] = "quality"
    """Of the answer its quality, or of the question its complexity."""
    lowest: int = Field(1, ge=0, le=99)
    """The worst number on the scale."""
    highest: int = Field(6, ge=1, le=100)
    """The best number on the scale."""

    @model_validator(mode="after")
    def _scale(self) -> Judge:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest} must lie below highest {self.highest}")
        return self

    def messages(self, question: str, answer: str) -> list[dict[str, str]]:
        """The conversation a judge is to continue."""
        form = QUALITY if self.aspect == "quality" else COMPLEXITY
        # one pass over the form, so that braces in a row's own text mean nothing
        given = {"question": question, "answer": answer, "lowest": str(self.lowest), "highest": str(self.highest)}
        return [{"role": "user", "content": re.sub(r"\{(\w+)\}", lambda m: given[m[1]], form)}]

    def score(self, questions: Sequence[str], answers: Sequence[str], judge: Callable[..., Any]) -> Array:
        """A number per row, [N]; NaN for an empty question or answer, and where the reply cannot be read.

        Args:
            questions: N texts.
            answers: N texts.
            judge: See the module.
        """
        result = np.full(len(questions), np.nan)
        at = _not_empty(questions, answers)
        asked = [self.messages(questions[i], answers[i]) for i in at]
        many = getattr(judge, "many", None)
        replies = many(asked) if many is not None else [judge(messages) for messages in asked]
        for i, reply in zip(at, replies, strict=True):
            value = number_in(reply) if isinstance(reply, str) else float(reply)
            result[i] = value if self.lowest <= value <= self.highest else np.nan
        return result


class Reward(Score):
    """What a reward model gives the answer to a question."""

    needs = ("questions", "answers", "reward")

    def score(self, questions: Sequence[str], answers: Sequence[str], reward: Callable[..., Any]) -> Array:
        """The model's reward per row, [N], on its own scale; NaN for an empty question or answer.

        Args:
            questions: N texts.
            answers: N texts.
            reward: See the module.
        """
        return _rewards(questions, answers, reward, _not_empty(questions, answers))


class OwnReward(Score):
    """What a reward model gives the answer that the model itself writes to the question (MoDS's necessity)."""

    needs = ("questions", "own_answers", "reward")
    good = "low"

    def score(self, questions: Sequence[str], answers: Sequence[str], reward: Callable[..., Any]) -> Array:
        """As `Reward.score`; a model that says nothing is rewarded for nothing, so only an empty question is NaN."""
        return _rewards(questions, answers, reward, _not_empty(questions, questions))


def _not_empty(questions: Sequence[str], answers: Sequence[str]) -> list[int]:
    return [i for i, (q, a) in enumerate(zip(questions, answers, strict=True)) if q.strip() and a.strip()]


def _rewards(questions: Sequence[str], answers: Sequence[str], reward: Callable[..., Any], at: Sequence[int]) -> Array:
    result = np.full(len(questions), np.nan)
    if at:
        given = np.asarray(reward([questions[i] for i in at], [answers[i] for i in at]), float)
        if given.shape != (len(at),):
            raise ValueError(f"the reward model gave {given.shape} numbers for {len(at)} rows")
        result[list(at)] = given
    return result


class RewardModel:
    """A sequence classifier with one logit, as a callable.

    Args:
        model: Any AutoModelForSequenceClassification with one label.
        tokenizer: Its tokenizer; with a chat template rows are rendered by it, else encoded as a pair of texts.
        batch_tokens: Most tokens of one forward pass.
        max_tokens: Longer rows are cut at the end.

    Raises:
        ValueError: When the model has not exactly one logit.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_tokens: int = 2_048, max_tokens: int = 2_048) -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model has one logit, and this one has {model.config.num_labels}")
        self.model, self.tokenizer, self.batch_tokens, self.max_tokens = model, tokenizer, batch_tokens, max_tokens

    def __call__(self, questions: Sequence[str], answers: Sequence[str]) -> Array:
        """[N] rewards, the same whatever the batch."""
        import torch

        from residency.modes import evaluating

        rows = [self._encoded(q, a) for q, a in zip(questions, answers, strict=True)]
        pad = self.model.config.get_text_config().pad_token_id
        alone = pad is None  # such a decoder cannot tell where a padded row ends
        result, device = np.empty(len(rows)), next(self.model.parameters()).device
        with evaluating(self.model), torch.no_grad():
            for some in batches([len(row["input_ids"]) for row in rows], 1 if alone else self.batch_tokens):
                width = max(len(rows[i]["input_ids"]) for i in some)
                fill = {"input_ids": pad or 0}
                inputs = {
                    name: torch.tensor(
                        [rows[i][name] + [fill.get(name, 0)] * (width - len(rows[i][name])) for i in some],
                        device=device,
                    )
                    for name in rows[some[0]]
                }
                result[some] = self.model(**inputs).logits[:, 0].double().cpu().numpy()
        return result

    def _encoded(self, question: str, answer: str) -> dict[str, list[int]]:
        """input_ids, attention_mask and what else the model reads."""
        cut = {"truncation": True, "max_length": self.max_tokens}
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            return dict(self.tokenizer(text, add_special_tokens=False, **cut))
        return dict(self.tokenizer(question, answer, **cut))


class DigitJudge:
    """A local language model as a judge: the expected digit under its next-token distribution.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        lowest: The scale, as in `Judge`; single digits.
        highest: Its upper end.
        batch_tokens: Most tokens of one forward pass.

    Raises:
        ValueError: When a digit of the scale is not a token of its own.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, lowest: int = 1, highest: int = 6, batch_tokens: int = 2_048
    ) -> None:
        if not 0 <= lowest < highest <= 9:
            raise ValueError(f"the scale {lowest} … {highest} must lie in 0 … 9: each number is one digit")
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.digits = list(range(lowest, highest + 1))
        self.ids = [tokenizer(str(digit), add_special_tokens=False)["input_ids"][-1] for digit in self.digits]
        wrong = [
            d for d, token in zip(self.digits, self.ids, strict=True) if tokenizer.decode([token]).strip() != str(d)
        ]
        if wrong:
            raise ValueError(f"the tokenizer has no token of its own for the digits {wrong}")

    def __call__(self, messages: list[dict[str, str]]) -> float:
        """The expected digit after one conversation."""
        return self.many([messages])[0]

    def many(self, conversations: Sequence[list[dict[str, str]]]) -> list[float]:
        """The expected digits after many conversations."""
        prompts = [self._encoded(messages) for messages in conversations]
        found, digits = [np.nan] * len(prompts), np.array(self.digits, float)
        with Reader(self.model, self.tokenizer, self.batch_tokens) as reader:
            for some in batches(list(map(len, prompts)), self.batch_tokens):
                hidden = reader.hidden([prompts[i] for i in some], [(len(prompts[i]) - 1, 1) for i in some])
                for part, logits in reader.logits(hidden):
                    p = logits[:, self.ids].double().softmax(1).cpu().numpy()
                    for i, value in zip(some[part], p @ digits, strict=True):
                        found[i] = float(value)
        return found

    def _encoded(self, messages: list[dict[str, str]]) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n".join(turn["content"] for turn in messages) + "\n"
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
