"""From rows and a model to entries of run.json: one pass over the items for all likelihood metrics.

Choice accuracy needs log p(answer | question) of the right answer and of wrong ones, bits per byte that of the
right one alone: both are taken from the same forward passes. The context of the unconditional likelihood is the
same prompt with an empty question, so that template and system turn cancel out of the ratio.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from residency import tokens
from residency.errors import DataError
from residency.evaluate.bits_per_byte import BitsPerByte
from residency.evaluate.choice import ChoiceAccuracy, distractors
from residency.evaluate.compare import entry, metric_of
from residency.evaluate.likelihood import answer_logprobs
from residency.multilabel import multi_hot, split
from residency.progress import Progress
from residency.rows import Row


def by_likelihood(
    metrics: Sequence[str],
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    choices: int = 4,
    resamples: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "scoring",
) -> dict[str, dict[str, Any]]:
    """Choice accuracy and bits per byte.

    Args:
        metrics: Which of the two.
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Held-out rows; a row's own `choices` are used before answers of other rows are drawn.
        choices: Candidates per row, the right one included.
        resamples: Of the bootstrap.
        seed: Of the drawn answers and of the bootstrap.
        progress: Where progress goes.
        label: What progress calls it.

    Returns:
        Metric → entry of run.json.
    """
    encoded = {row.id: tokens.encode(row, tokenizer) for row in rows}
    wrong = _wrong_answers(rows, choices - 1, seed) if "choice-accuracy" in metrics else {}
    texts = {row.id: [row.answer, *wrong.get(row.id, [])] for row in rows}
    candidates = {
        row.id: [encoded[row.id].answer, *(_answer(row, text, tokenizer) for text in texts[row.id][1:])] for row in rows
    }
    conditional: dict[str, list[float]] = {}
    with (progress or Progress()).task(f"scoring the {label}", len(rows)) as advance:
        prompts = [encoded[row.id].prompt for row in rows]
        scored = answer_logprobs(model, prompts, [candidates[row.id] for row in rows], advance=advance)
        for row, found in zip(rows, scored, strict=True):
            conditional[row.id] = [total for total, _ in found]
    result: dict[str, dict[str, Any]] = {}
    if "choice-accuracy" in metrics:
        alone = _alone(model, tokenizer, rows, candidates)
        choice = ChoiceAccuracy()
        for row in rows:
            base = [alone[_context(row, tokenizer), tuple(answer)] for answer in candidates[row.id]]
            choice.update(row.id, texts[row.id], conditional[row.id], base)
        result["choice-accuracy"] = entry(choice.compute(resamples, seed))
    if "bits-per-byte" in metrics:
        bits = BitsPerByte()
        for row in rows:
            bits.update(row.id, conditional[row.id][0], row.answer)
        result["bits-per-byte"] = entry(bits.compute(resamples, seed))
    return result


def by_generation(
    metrics: Sequence[str],
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_new_tokens: int = 64,
    resamples: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "scoring",
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Metrics of greedily generated answers (see `by_likelihood` for the arguments; `options` go to `generate`)."""
    from residency.generate import generate

    found = {name: metric_of(name) for name in metrics}
    prompts = [tokens.encode(row, tokenizer).prompt for row in rows]
    said = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **options)
    with (progress or Progress()).task(f"answering the {label}", len(rows)) as advance:
        for row, text in zip(rows, said, strict=True):
            for metric in found.values():
                metric.update(row.id, text.strip(), row.answer)  # type: ignore[attr-defined]
            advance(1)
    return {name: entry(metric.compute(resamples, seed)) for name, metric in found.items()}


def of_predictions(
    metric: str, rows: Sequence[Row], predictions: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """A metric of predicted labels."""
    found: Any = metric_of(metric)
    for row, prediction in zip(rows, predictions, strict=True):
        found.update(row.id, prediction, row.answer)
    return entry(found.compute(resamples, seed))


def confusion(gold: Sequence[str], said: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix as a figure spec: rows are the truth."""
    classes = sorted({*gold, *said})
    counts = Counter(zip(gold, said, strict=True))
    return {
        "kind": "heatmap",
        "title": "Confusion",
        "x": classes,
        "y": classes,
        "z": [[counts[g, s] for s in classes] for g in classes],
        "xlabel": "predicted",
        "ylabel": "true",
    }


def confusion_of_sets(gold: Sequence[str], said: Sequence[str]) -> dict[str, Any]:
    """Label sets against label sets, as a figure spec: how many items with true label i were given label j."""
    true, given = ([split(text) for text in side] for side in (gold, said))
    classes = sorted(set().union(*true, *given))
    counts = multi_hot(true, classes).T.astype(int) @ multi_hot(given, classes).astype(int)
    return {
        "kind": "heatmap",
        "title": "Labels given, by true label",
        "x": classes,
        "y": classes,
        "z": counts.tolist(),
        "xlabel": "given",
        "ylabel": "true",
    }


def _wrong_answers(rows: Sequence[Row], n: int, seed: int) -> dict[str, list[str]]:
    """Wrong answers per row: its own choices, or answers of other held-out rows."""
    answers = {row.id: row.answer for row in rows}
    given = {row.id: [c for c in row.choices if c != row.answer] for row in rows if row.choices}
    if short := [i for i, own in given.items() if not own]:
        raise DataError("the row's choices hold no wrong answer", where=short[0])
    drawn = distractors(answers, n, seed) if len(given) < len(rows) else {}
    return {i: given[i] if i in given else [answers[other] for other in drawn[i]] for i in answers}


def _answer(row: Row, text: str, tokenizer: Any) -> tuple[int, ...]:
    return tokens.encode(replace(row, messages=(*row.messages[:-1], ("assistant", text))), tokenizer).answer


def _context(row: Row, tokenizer: Any) -> tuple[int, ...]:
    """The row's prompt with its last question left empty: system turn, history and template stay."""
    last = max(i for i, (role, _) in enumerate(row.messages) if role == "user")
    turns = [(role, "" if i == last else content) for i, (role, content) in enumerate(row.messages)]
    return tokens.encode(replace(row, messages=tuple(turns)), tokenizer).prompt


def _alone(
    model: Any, tokenizer: Any, rows: Sequence[Row], candidates: dict[str, Any]
) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """Log-probability, given an empty question, of every distinct candidate in every distinct context, each once."""
    wanted: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for row in rows:
        wanted.setdefault(_context(row, tokenizer), {}).update((tuple(a), None) for a in candidates[row.id])
    scored = answer_logprobs(model, list(wanted), [list(answers) for answers in wanted.values()])
    return {
        (context, answer): total
        for (context, answers), found in zip(wanted.items(), scored, strict=True)
        for answer, (total, _) in zip(answers, found, strict=True)
    }
